"""The examples as a user runs them: alone, under mpirun and under torchrun."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MPIRUN = [
    "mpirun",
    "--allow-run-as-root",
    "--oversubscribe",
    "--bind-to",
    "none",
    "--mca",
    "mpi_yield_when_idle",
    "1",
    "-n",
    "{n}",
    sys.executable,
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "{n}"]


def run(launcher, ranks, script, *arguments):
    """Return the output of the example; skip the test without a launcher."""
    command = [] if ranks == 1 else [part.format(n=ranks) for part in launcher]
    if command and not (shutil.which(command[0]) or os.path.exists(command[0])):
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        [*(command or [sys.executable]), str(ROOT / "examples" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("launcher,ranks", [(MPIRUN, 4), (TORCHRUN, 2)], ids=["mpirun", "torchrun"])
def test_training(launcher, ranks, tmp_path):
    """The loss falls and equals that of one rank at every step; the tables and the picture exist."""
    picture = tmp_path / "training.png"
    small = [
        "--steps",
        "20",
        "--every",
        "5",
        "--batch",
        "6",
        "--length",
        "32",
        "--hidden",
        "32",
    ]  # 6: uneven parts for 4 ranks
    said = run(launcher, ranks, "train_moe.py", *small, "--check", "--plot", str(picture))
    assert f"{ranks} ranks, 16 experts" in said
    steps = [
        (int(a), float(b), float(c))
        for a, b, c in re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +[\d.]+$", said, re.M)
    ]
    assert [s for s, *_ in steps] == [0, 5, 10, 15, 19] and steps[-1][1] < 0.8 * steps[0][1], said
    assert all(balance >= 1 for *_, balance in steps)
    assert len(re.findall(r"^  layer \d:(?: [\d.]+){16}$", said, re.M)) == 2, said
    assert float(re.search(r"relative difference at any step ([\d.e+-]+)", said)[1]) < 2e-3
    assert picture.read_bytes()[:4] == b"\x89PNG"


HELLO, LAYER = (
    ("hello_dispatch.py", r"rank \d has its 5 tokens back"),
    ("moe_layer.py", r"rank \d, step 2: loss [\d.]+"),
)


@pytest.mark.parametrize(
    "launcher,ranks,script,lines",
    [(None, 1, *HELLO), (TORCHRUN, 2, *HELLO), (MPIRUN, 2, *LAYER)],
    ids=["hello-alone", "hello-torchrun", "layer-mpirun"],
)
def test_short_examples(launcher, ranks, script, lines):
    said = run(launcher, ranks, script)
    assert len(re.findall(lines, said)) == ranks, said
    if script == "moe_layer.py":
        losses = [float(v) for v in re.findall(r"rank 0, step \d: loss ([\d.]+)", said)]
        assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_the_code_of_the_training_guide_runs(tmp_path):
    """All blocks of docs/training.md that can run in one process, in order."""
    text = (ROOT / "docs" / "training.md").read_text()
    code = "\n".join(re.findall(r"(?<!-->\n)```python\n(.*?)```", text, re.S))
    assert code.count("\n") > 50
    (tmp_path / "guide.py").write_text(code + "\nprint('the guide ran')\n")
    done = subprocess.run(
        [sys.executable, "guide.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.stdout.endswith("the guide ran\n"), done.stderr[-3000:]
    assert (tmp_path / "overlap.json").stat().st_size > 1000
