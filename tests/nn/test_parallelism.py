"""MoE layers beside torch's DDP, FSDP2 and distributed checkpoints, over processes joined by gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "scenarios",
    [
        ["plain_is_refused", 2, "mesh_is_refused", 2, "forms", 4, "compiled", 2],
        ["ddp", 2, "ddp_plain", 4, "fsdp", 4, "fsdp_of_experts", 4],
        ["raw_optimizer", 2, "save_by_four", 4, "load_by_two", 2, "load_by_eight", 8],
    ],
    ids=["refused", "trained", "checkpoints"],
)
def test_over_ranks(scenarios, tmp_path):
    """What each scenario shows is said at its function in tests/support/parallel_worker.py."""
    worker = str(ROOT / "tests" / "support" / "parallel_worker.py")
    done = subprocess.run(
        [sys.executable, worker, str(tmp_path), *map(str, scenarios)],
        capture_output=True,
        text=True,
        timeout=180,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
