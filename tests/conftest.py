"""What all suites share: helpers can be imported, processes start quickly."""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))
os.environ.setdefault(
    "CUDA_DEVICE_MAX_CONNECTIONS", "32"
)  # as cuda.prepare_threads(): tests ask for a GPU before they run ranks on it


@pytest.fixture(scope="session")
def processes():
    """A multiprocessing context whose server has imported everything and forks a rank in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "survivors",
            "hosts",
            "replicated",
            "joining",
            "agreeing",
            "mask_worker",
            "lasting_worker",
            "growing_worker",
            "join_deaths",
        ]
    )
    with pytest.MonkeyPatch.context() as patch:  # the server looks for modules nowhere else
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C: a shell that runs the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
