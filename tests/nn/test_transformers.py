"""moecomm in Hugging Face transformers: a DeepseekV3 on several ranks equals the one in a single process.

transformers has a separate environment (`make transformers`), so that the other tests do not depend on it.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = ROOT / ".venv-transformers" / "bin" / "python"
PYTHON = sys.executable if find_spec("transformers") else str(OWN) if OWN.exists() else None
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="transformers >= 5.23 is not installed: make transformers"
)


def run(*command):
    """Return the last line of the worker's output."""
    done = subprocess.run(
        [PYTHON, *command],
        capture_output=True,
        text=True,
        timeout=180,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder with the model and the results of a single process, and the line about routers."""
    folder = tmp_path_factory.mktemp("deepseek")
    return folder, run(str(ROOT / "tests" / "support" / "transformers_worker.py"), "single", str(folder))


def test_gate_equals_the_router(model):
    """The gate picks the same experts and weights as DeepseekV3TopkRouter with the same parameters."""
    assert float(re.fullmatch(r"router (\S+)", model[1])[1]) <= 1e-6


@pytest.mark.parametrize("ranks,arrangement", [(2, "shared"), (4, "split")])
def test_model_over_ranks_equals_a_single_process(model, ranks, arrangement):
    """Logits within 1e-6 in float32, and gradients of all parameters.

    Ranks share a batch, or have different batches.
    """
    said = run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(ROOT / "tests" / "support" / "transformers_worker.py"),
        arrangement,
        str(model[0]),
    )
    logits, grads, scale = map(float, re.fullmatch(r"logits (\S+) grads (\S+) of (\S+)", said).groups())
    assert logits <= 1e-6 and grads <= 1e-6 < scale, said


@pytest.fixture(scope="module")
def losses(model):
    """Return the losses that Trainer logs in one process."""
    return _losses(model[0])


def _losses(folder, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    worker = str(ROOT / "tests" / "support" / "transformers_worker.py")
    said = run(*launcher[: 0 if ranks == 1 else None], worker, "trainer", str(folder))
    return [float(word) for word in said.split()[1:]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_trainer_over_ranks_learns_what_one_process_learns(model, losses, ranks):
    """Hugging Face's Trainer, unmodified: experts split over ranks, all other parameters sharded (FSDP2), clipped."""
    got = _losses(model[0], ranks)
    assert len(got) == len(losses) == 5 and len(set(losses)) == 5
    assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) <= 1e-5, (got, losses)
