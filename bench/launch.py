"""Starts the ranks of a benchmark: `python -m bench ...` without a launcher calls mpirun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launched():
    """Number of ranks of the launcher that has started this process, or 0 without a launcher."""
    return next(
        (
            int(os.environ[name])
            for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")
            if name in os.environ
        ),
        0,
    )


def mpirun(ranks):
    """Command that starts `ranks` processes on this host. It allows more ranks than cores, and waits of MPI yield."""
    beside = Path(sys.executable).with_name("mpirun")
    command = [
        str(beside) if beside.exists() else "mpirun",
        "-n",
        str(ranks),
        "--oversubscribe",
        "--bind-to",
        "none",
        "--mca",
        "mpi_yield_when_idle",
        "1",
    ]
    if os.geteuid() == 0:
        command.insert(1, "--allow-run-as-root")
    return command


def terminal():
    """The terminal of stderr, or "" if stderr is not a terminal."""
    return os.ttyname(sys.stderr.fileno()) if sys.stderr.isatty() else ""


def relaunch(ranks, argv):
    """Run `python -m bench argv` with this number of ranks; return the exit status."""
    return subprocess.call([*mpirun(ranks), *program(), *argv], env=environment(BENCH_PROGRESS=terminal()))


def program():
    """Command of the benchmarks: module `bench` in a checkout, or `moecomm.bench` if installed."""
    return [sys.executable, "-m", __package__]


def environment(**more):
    """Environment in which program() works in any folder."""
    if __package__ != "bench":
        return dict(os.environ, **more)
    paths = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(paths), **more)
