"""torch.export: a program names its Buffer by shape, so that another process finds its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    """What the worker prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "export_worker.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout.strip().splitlines()


@pytest.mark.parametrize("mode", ["strict", "not strict"])
def test_another_process_finds_its_own_buffer(mode, tmp_path):
    """Other Buffers there have the numbers that this process used; without one of the shape, or with two
    communicators, the program says so.
    """
    name = "hidden=32 num_experts=8 top_k=2 dtype=torch.float32 ranks=1"
    (said,) = run("save", tmp_path / "layer.pt2", mode)
    assert f"'{name}'" in said and "#" not in said, said
    none, first, calls, two, second = run("load", tmp_path / "layer.pt2")
    assert none.startswith("none:") and f"no living Buffer is '{name}'" in none
    assert first == second == "difference 0.0"
    assert calls == "calls 2 0 0"
    assert two.startswith("two:") and "several communicators" in two and name in two
