"""Kernels of ranks on one GPU wait for each other: concurrent kernels must fit, else they are refused by name."""

import gc

import pytest
import torch
from emulated_gpu import emulated  # noqa: F401 - a fixture

import moecomm

HIDDEN, TOKENS = 64, 4  # the emulated GPU has 132 multiprocessors


def make(comm, num_sms, **more):
    """Make a buffer with one expert per rank."""
    return moecomm.Buffer(
        comm, hidden=HIDDEN, num_experts=comm.size, top_k=1, max_tokens=TOKENS, num_sms=num_sms, **more
    )


def run(main, size):
    """Run main(comm) on rank threads of one GPU."""
    moecomm.run_local(main, size, ranks_per_node=size, device="cuda:0", timeout=20.0)


def test_buffers_of_all_communicators_are_counted(emulated):  # noqa: F811
    """Kernels of one communicator run in sequence, so its largest open buffer counts. The sum must fit."""

    def main(comm):
        other = comm.shrink(range(comm.size))
        first, small = make(comm, 40), make(comm, 20)
        for _ in range(2):  # on all ranks, and a refusal leaves nothing behind
            with pytest.raises(
                moecomm.InvalidArgument,
                match=r"num_sms is 30, .* that share .* need 140 multiprocessors together; expected at most 132",
            ):
                make(other, 30)
        make(other, 26).close()
        first.close()
        second = make(other, 46)  # 2 x (20 + 46)
        small.close()
        make(other, 66).close()
        del first, small, second
        gc.collect()
        other.close()

    run(main, 2)


def test_a_dropped_buffer_counts_no_more(emulated):  # noqa: F811
    def main(comm):
        for _ in range(3):
            other = comm.shrink(range(comm.size))
            make(other, 100)
            other.close()

    run(main, 1)


def test_calls_of_a_communicator_run_after_each_other(emulated):  # noqa: F811
    """Two buffers on two streams, and an asynchronous call: each waits for the call before it."""

    def main(comm):
        a, b = make(comm, 2), make(comm, 2, decode=True)
        x, ids = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.zeros((TOKENS, 1), dtype=torch.int64)
        streams = [torch.cuda.Stream() for _ in range(2)]
        calls = (
            lambda: a.dispatch(x, ids, capacity=8),
            lambda: b.dispatch(x, ids, capacity=8),
            lambda: b.decode_dispatch(x, ids, quant=None, return_hook=False),
        )
        for i in range(6):
            stream = streams[i % 2]
            before = comm.cuda.latest[1]
            with emulated.stream(stream):
                calls[i % 3]()
            assert (before in stream.waited) == (i > 0) and comm.cuda.latest[0] is stream
        before = comm.cuda.latest[1]
        a.dispatch(x, ids, capacity=8, async_op=True).wait()
        assert before in comm.cuda.stream.waited and comm.cuda.stream.priority < 0

    run(main, 1)


def test_nothing_ends_the_capture_of_another_thread(emulated):  # noqa: F811
    """During a capture in the default mode, another thread makes and drops buffers, waits and reads counters."""

    def main(comm):
        x, ids = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.zeros((TOKENS, 1), dtype=torch.int64)
        with emulated.captured_elsewhere() as refused:
            buf = make(comm, 2, decode=True, arena_bytes=4096)
            buf.dispatch(x, ids)
            with pytest.raises(moecomm.CapacityExceeded):
                kept = [buf.dispatch(x, ids) for _ in range(10)]  # noqa: F841
            buf.decode_dispatch(x, ids, quant=None, return_hook=False)
            buf.stats()
            buf.close()
            assert refused() == 0

    run(main, 1)
