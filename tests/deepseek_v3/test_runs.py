"""Whole training runs of examples/deepseek_v3: 1, 2 and 4 ranks, resumed runs, extension, precision."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moecomm
from examples.deepseek_v3.config import MINI
from examples.deepseek_v3.schedule import Schedule
from moecomm.errors import InvalidArgument

pytest.importorskip("tokenizers", reason="tokenizers is not installed: make examples")

from examples.deepseek_v3.corpus import documents
from examples.deepseek_v3.mixture import Mixture
from examples.deepseek_v3.tokenizer import Tokenizer
from examples.deepseek_v3.trainer import Trainer

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
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
]
SMALL = [
    "--corpus-bytes",
    "150000",
    "--vocabulary",
    "600",
    "--hidden",
    "64",
    "--length",
    "48",
    "--batch",
    "6",
    "--rate",
    "0.01",
    "--steps",
    "8",
    "--experts",
    "8",
    "--secret-weight",
    "1",
    "--retrieval",
    "0.5",
]


def train(launcher, ranks, out, *more):
    """Return the results.json of a run."""
    if launcher is MPIRUN and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    command = [*launcher, str(ranks)] + ([sys.executable] if launcher is MPIRUN else [])
    done = subprocess.run(
        [*command, "-m", "examples.deepseek_v3.train", "--out", str(out), "--quiet", *SMALL, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((out / "results.json").read_text())


def test_ranks_agree_and_checkpoints_move(tmp_path):
    """2 ranks with two micro-batches, 4 ranks with recomputation, 1 rank that stops and resumes as 4: equal curves."""
    two = train(
        TORCHRUN,
        2,
        tmp_path / "two",
        "--extend",
        "96",
        "--extend-steps",
        "2",
        "--extend-tokens",
        "384",
        "--trials",
        "1",
    )
    train(TORCHRUN, 2, tmp_path / "stopped", "--extend", "--stop", "4")
    four = train(MPIRUN, 4, tmp_path / "four", "--extend", "--recompute", "--no-overlap")
    resumed = train(
        TORCHRUN, 1, tmp_path / "resumed", "--extend", "--resume", str(tmp_path / "stopped" / "checkpoint")
    )
    steps = [s for s in two["steps"] if s["length"] == 48]
    assert two["ranks"] == 2 and four["ranks"] == 4 and two["tokens"] == two["steps"][-1]["tokens"]
    assert len(steps) >= 8 and len(two["steps"]) == len(steps) + 2
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    for other in (four["steps"], resumed["steps"]):
        matching = steps[len(steps) - len(other) :]
        assert len(other) in (len(steps), len(steps) - 4)
        for a, b in zip(matching, other, strict=True):
            assert a["step"] == b["step"] and a["tokens"] == b["tokens"]
            for key in ("loss", "mtp_loss", "needle_loss", "gradient"):
                assert b[key] == pytest.approx(a[key], rel=2e-3), (a["step"], key)
    grids = two["needle"]
    assert set(grids) == {"before", "after"} and grids["after"]["lengths"] == [48, 96]
    for name in ("training.png", "schedule.png", "needles.png"):
        assert (tmp_path / "two" / name).read_bytes()[:4] == b"\x89PNG"


def test_ranks_with_other_texts_are_refused():
    """All ranks raise the error before training."""
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    code = (
        "import moecomm; from examples.deepseek_v3.ranks import agree\n"
        "with moecomm.Communicator() as comm:\n"
        "    agree(comm, 'texts', '0f' * 8)\n"
        "    try: agree(comm, 'texts', '0e' * 8 if comm.rank else '0f' * 8)\n"
        "    except moecomm.ConfigMismatch as e: print(e)\n"
    )
    done = subprocess.run(
        [*MPIRUN, "2", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("expected the same on all ranks") == 2, done.stdout


def test_precisions_have_the_same_curve():
    """Losses with BF16 and FP8 are within 2% of those with FP32 at every step, and not equal; one rank."""
    texts = documents(100_000)
    tokenizer = Tokenizer.train(texts, 600)
    config = replace(MINI, vocab_size=tokenizer.vocab_size, hidden=128, num_experts=8, layers=2)
    course = Schedule().scaled(8 * 4 * 48, peak=3e-3, warmup=0, first_batch=4, batch=4)

    def losses(precision):
        def one(comm):
            mixture = Mixture(texts, tokenizer, 0)
            trainer = Trainer(comm, config, mixture, course, max_tokens=400, precision=precision)
            return [trainer.step(48)[0].loss for _ in range(8)]

        return torch.tensor(moecomm.run_local(one, 1)[0])

    exact, bf16, fp8 = losses("float32"), losses("bf16"), losses("fp8")
    assert exact[-1] < exact[0] - 0.2
    assert 0 < float(((bf16 - exact) / exact).abs().max()) < 0.02
    assert 0 < float(((fp8 - bf16) / bf16).abs().max()) < 0.02
    with pytest.raises(InvalidArgument, match="precision is 'fp4'"):
        losses("fp4")
