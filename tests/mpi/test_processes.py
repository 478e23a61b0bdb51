"""Processes that fork, are interrupted, or lack a network or memory."""

import gc
import os
import signal
import threading
import time

import pytest
import torch

import moecomm

pytestmark = pytest.mark.mpi(min_size=2)
TIMEOUT = 20.0
SHAPE = dict(hidden=64, num_experts=24, top_k=2, max_tokens=4)
X, IDS = torch.ones(4, 64).bfloat16(), torch.tensor([[0, 23], [12, 1], [-1, 5], [7, 3]])


@pytest.mark.parametrize("child_does", ["use", "close", "drop"])
def test_a_forked_child_harms_nobody(world, child_does):
    """Like a DataLoader's worker, the child inherits everything, uses nothing, and frees the inherited objects."""
    comm = moecomm.Communicator(world, ranks_per_node=1, timeout=TIMEOUT)
    buf = moecomm.Buffer(comm, **SHAPE)
    kept = buf.dispatch(X, IDS).x
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if child_does == "use":
                try:
                    buf.dispatch(X, IDS)
                except moecomm.InvalidArgument as error:
                    status = 0 if "forked child" in str(error) else 2
            else:
                if child_does == "close":
                    buf.close()
                    comm.close()
                del buf, comm, kept
                gc.collect()
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    for _ in range(3):
        out = buf.dispatch(X, IDS)
        assert torch.equal(buf.combine(out.x, out.handle)[:2], 2 * X[:2])
    del kept
    comm.barrier()
    comm.close()


def test_ctrl_c_ends_a_wait(world, ctrl_c):
    """The waiting rank raises KeyboardInterrupt at once; the others raise PeerLost."""
    with moecomm.Communicator(world, timeout=TIMEOUT) as comm:
        buf = moecomm.Buffer(comm, **SHAPE)
        began = time.monotonic()
        if comm.rank == 0:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                buf.dispatch(X, IDS)
        else:
            time.sleep(0.6)
            with pytest.raises(moecomm.PeerLost, match="rank 0"):
                buf.dispatch(X, IDS)
        assert time.monotonic() - began < TIMEOUT / 2
        world.Barrier()


def test_no_transport_between_nodes(world, monkeypatch):
    """All ranks raise at once, and the error names the transport missing from UCX_TLS."""
    monkeypatch.setenv("UCX_TLS", "posix,self")
    with pytest.raises(
        moecomm.MoecommError, match=r"UCX cannot connect to rank \d.*UCX_TLS is posix,self; expected.*tcp"
    ) as raised:
        moecomm.Communicator(world, ranks_per_node=1, timeout=TIMEOUT)
    assert (
        raised.value.op == "Communicator"
        and raised.value.phase == "connect"
        and raised.value.rank == world.rank
    )
    world.Barrier()


def test_more_memory_than_there_is(world):
    with moecomm.Communicator(world, timeout=TIMEOUT) as comm:
        with pytest.raises(
            moecomm.MoecommError, match=r"Buffer: rank 0 failed: cannot map a window of .* bytes"
        ):
            moecomm.Buffer(comm, **SHAPE, arena_bytes=1 << 46)
        buf = moecomm.Buffer(comm, **SHAPE)
        buf.dispatch(X, IDS)
        comm.barrier()
