"""Starts a benchmark's ranks: `python -m bench ...` without a launcher calls mpirun itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launched():
    """How many ranks a launcher has started, of which this process is one; 0 where none has."""
    return next(
        (
            int(os.environ[name])
            for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")
            if name in os.environ
        ),
        0,
    )


def mpirun(ranks):
    """The command that starts ranks processes here, with more ranks than cores allowed and the waits of MPI polite."""
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
    """The terminal that this process's messages go to; empty where they go elsewhere."""
    return os.ttyname(sys.stderr.fileno()) if sys.stderr.isatty() else ""


def relaunch(ranks, argv):
    """Run `python -m bench argv` as that many ranks; returns the exit status."""
    return subprocess.call([*mpirun(ranks), *program(), *argv], env=environment(BENCH_PROGRESS=terminal()))


def program():
    """The command of these benchmarks: `bench` of a checkout, or `moecomm.bench` where it is installed."""
    return [sys.executable, "-m", __package__]


def environment(**more):
    """The environment in which program() is found from any folder."""
    if __package__ != "bench":
        return dict(os.environ, **more)
    paths = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(paths), **more)
