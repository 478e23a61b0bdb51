"""Suites for mpirun: all ranks run the same tests.

A failure on one rank fails all of them, and rank 0 reports it.

mpirun -n 4 python -m pytest --with-mpi tests/mpi

Ranks other than 0 print nothing unless a test failed on them.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))


@pytest.hookimpl(trylast=True)  # the reporter registers in its own configure hook
def pytest_configure(config):
    if RANK and config.getoption("--with-mpi", default=False):
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """Make ranks agree on the outcome before the next test begins."""
    result = yield
    if item.get_closest_marker("mpi") is None:
        return
    from mpi4py import MPI

    error = None if result.excinfo is None else f"{result.excinfo[0].__name__}: {result.excinfo[1]}"
    skipped = error is not None and issubclass(result.excinfo[0], pytest.skip.Exception)
    everyone = MPI.COMM_WORLD.allgather(None if skipped else error)
    bad = {r: e for r, e in enumerate(everyone) if e is not None}
    if bad and (error is None or skipped):
        pytest.fail(
            "failed on other ranks: " + "; ".join(f"rank {r}: {e[:400]}" for r, e in bad.items()),
            pytrace=False,
        )
    elif bad and RANK:
        sys.__stderr__.write(f"[rank {RANK}] {item.nodeid}: {error[:2000]}\n")


@pytest.fixture
def world():
    """Return MPI.COMM_WORLD."""
    from mpi4py import MPI

    return MPI.COMM_WORLD
