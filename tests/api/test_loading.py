"""Batches from forked and spawned DataLoader workers, in a training loop on rank threads and on processes."""

import json
import re

import pytest
from launching import ROOT, mpirun, start
from loading_worker import train

import moecomm


@pytest.fixture(scope="module")
def expected():
    """Return the losses by rank, without workers."""
    return moecomm.run_local(lambda comm: train(comm, None), 2, ranks_per_node=1, timeout=60)


def assert_close(losses, expected):
    """Compare losses; torch's sums depend on the number of threads."""
    for mine, theirs in zip(losses, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_rank_threads(method, expected):
    losses = moecomm.run_local(lambda comm: train(comm, method), 2, ranks_per_node=1, timeout=60)
    assert_close(losses, expected)
    assert all(sum(each[3:]) < sum(each[:3]) for each in losses), "it learns"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method, expected):
    output = start(*mpirun(2), ROOT / "tests" / "support" / "loading_worker.py", method)
    assert_close([json.loads(re.search(rf"rank {rank}: (.*)", output)[1]) for rank in range(2)], expected)


@pytest.mark.filterwarnings("ignore:Got pickle error")
@pytest.mark.parametrize(
    "method,error,message",
    [
        ("fork", moecomm.InvalidArgument, "the parent process"),
        ("spawn", TypeError, "a Communicator belongs to its process and cannot be pickled"),
    ],
)
def test_a_worker_cannot_use_the_communicator(method, error, message):
    with pytest.raises(error, match=message):
        moecomm.run_local(lambda comm: train(comm, method, careless=True), 2, timeout=60)
