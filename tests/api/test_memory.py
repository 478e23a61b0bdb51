"""The arena: tensors hold their piece of the window, garbage collection frees it, and a full arena is an error."""

import gc
import os

import numpy as np
import pytest
import torch
from worlds import assert_same, random_world

import moecomm


def one(comm, **options):
    """Return a small buffer and the inputs of one rank."""
    buf = moecomm.Buffer(
        comm, **{**dict(hidden=64, num_experts=4 * comm.size, top_k=2, max_tokens=16), **options}
    )
    torch.manual_seed(comm.rank)
    return buf, torch.randn(16, 64).bfloat16(), torch.rand(16, 4 * comm.size).argsort(1)[:, :2].contiguous()


def held(buf):
    """Return (bytes, pieces) of the arena that are still in use."""
    gc.collect()
    return buf.backend.memory.native.arena()[:2]


def test_tensors_hold_their_piece_and_give_it_back():
    def main(comm):
        buf, x, ids = one(comm)
        assert held(buf) == (0, 0)
        outs = [buf.dispatch(x + i, ids) for i in range(3)]
        copies = [out.x.clone() for out in outs]
        assert held(buf)[1] >= 3
        later = [buf.dispatch(x + 10, ids) for _ in range(2)]  # in other pieces
        for i, (out, copy) in enumerate(zip(outs, copies, strict=True)):
            assert_same(out.x, copy, f"rows of dispatch {i}")
        kept = outs[1].x[3:5]
        expected = kept.clone()
        comm.barrier()
        del outs, later, out
        assert held(buf)[1] == 1, "a view of a view holds the piece"
        for i in range(4):  # no call overwrites it
            buf.dispatch(x - i, ids)
        assert_same(kept, expected, "the view")
        del kept
        assert held(buf) == (0, 0)
        comm.barrier()

    moecomm.run_local(main, 4, ranks_per_node=2)


def test_dispatch_returns_views_of_the_window():
    def main(comm):
        buf, x, ids = one(comm)
        out = buf.dispatch(x, ids)
        first = out.x.data_ptr()
        for tensor in (out.topk_weights, out.handle.rows):  # all in the piece of this dispatch
            assert first < tensor.data_ptr() < first + held(buf)[0]
        comm.barrier()

    moecomm.run_local(main, 2)


def test_a_full_arena_names_size_holder_and_argument():
    def main(comm):
        buf, x, ids = one(comm, arena_bytes=32768)
        keep = []
        with pytest.raises(moecomm.CapacityExceeded) as raised:
            for _ in range(1000):
                keep.append(buf.dispatch(x, ids))  # noqa: PERF401 - keep what precedes the error
        text, error = str(raised.value), raised.value
        assert error.op == "dispatch" and error.rank == comm.rank and error.expected > error.got
        assert "arena_bytes" in text and "32768 bytes" in text and f"{2 * len(keep)} pieces" in text, text
        comm.barrier()
        keep.clear()
        gc.collect()
        comm.barrier()
        out = buf.dispatch(x, ids)  # still usable
        y = buf.combine(out.handle.rows.copy_(out.x), out.handle)
        comm.barrier()
        return x, y

    for x, y in moecomm.run_local(main, 4, ranks_per_node=2):
        assert_same(y, x * 2, "y")


def test_a_small_capacity_names_rows_and_argument():
    def main(comm):
        buf, x, ids = one(comm)
        ids = torch.zeros_like(ids)
        ids[:, 1] = -1  # all 16 tokens of all ranks pick expert 0
        with pytest.raises(moecomm.CapacityExceeded) as raised:
            buf.dispatch(x, ids, capacity=16 * comm.size - 1)
        assert (raised.value.peer, raised.value.expected, raised.value.got) == (
            0,
            16 * comm.size,
            16 * comm.size - 1,
        )
        assert "`capacity`" in str(raised.value)
        out = buf.dispatch(x, ids, capacity=16 * comm.size)
        assert len(out.x) == 16 * comm.size
        comm.barrier()

    moecomm.run_local(main, 4, ranks_per_node=2)


def test_tensors_outlive_buffer_and_communicator():
    def main(comm):
        buf, x, ids = one(comm)
        out = buf.dispatch(x, ids)
        expected = out.x.clone()
        comm.barrier()
        buf.close()
        buf.close()  # a second call is valid
        return out.x, expected

    for got, expected in moecomm.run_local(main, 3):
        assert_same(got, expected, "rows")


def test_numpy_goes_in_through_dlpack():
    xs, ids, weights = random_world(2, 9, 64, 8, 3, dtype=torch.float32)

    def main(comm):
        r = comm.rank
        buf = moecomm.Buffer(comm, hidden=64, num_experts=8, top_k=3, max_tokens=9, dtype=torch.float32)
        plain = buf.dispatch(xs[r], ids[r], weights[r])
        arrays = buf.dispatch(xs[r].numpy(), ids[r].numpy(), weights[r].numpy())
        assert_same(arrays.x, plain.x, "rows")
        assert_same(arrays.topk_weights, plain.topk_weights, "weights")
        rows = np.asarray(plain.x).copy()
        bias = np.linspace(0, 1, 64, dtype=np.float32)
        y = buf.combine(rows, plain.handle, bias=bias, topk_weights=plain.topk_weights.numpy().copy())
        assert_same(
            y,
            buf.combine(
                plain.x.clone(), plain.handle, bias=torch.from_numpy(bias), topk_weights=plain.topk_weights
            ),
            "y",
        )
        comm.barrier()

    moecomm.run_local(main, 2)


def test_cupy_goes_in_through_dlpack():
    cupy = pytest.importorskip("cupy", reason="cupy is not installed: its arrays live on a GPU")

    def main(comm):
        buf, x, ids = one(comm)
        with pytest.raises(moecomm.InvalidArgument, match=r"on cuda.*expected.*on cpu"):
            buf.dispatch(
                cupy.asarray(x.float().numpy()), ids
            )  # the cpu world uses no device memory, and reports that

    moecomm.run_local(main, 1)


def test_a_thousand_steps_leave_nothing_behind():
    """A thousand steps leak nothing.

    All kinds of calls on two buffers, then worlds and buffers that are made and closed: no file descriptor, mapping
    or piece of an arena is left.
    """

    def held():
        gc.collect()
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum("memfd:moecomm" in line for line in maps)

    x, ids = torch.randn(16, 64).bfloat16(), torch.rand(16, 8).argsort(1)[:, :2].contiguous()

    def main(comm, steps):
        bufs = [
            moecomm.Buffer(comm, hidden=64, num_experts=8, top_k=2, max_tokens=16, decode=True)
            for _ in range(2)
        ]
        for step in range(steps):
            buf = bufs[step % 2]
            out = buf.dispatch(x, ids)
            buf.combine(out.x, out.handle)
            if step % 5 == 0:
                buf.dispatch(x, ids, async_op=True).wait()
            received, _ = buf.decode_dispatch(x, ids, return_hook=False)
            buf.decode_combine(received.handle.rows, ids, None, received.handle, return_hook=False)
            del out, received
        assert all(buf.backend.memory.native.arena()[:2] == (0, 0) for buf in bufs)
        comm.barrier()

    moecomm.run_local(lambda comm: main(comm, 2), 2, ranks_per_node=1)
    before = held()
    moecomm.run_local(lambda comm: main(comm, 1000), 2, ranks_per_node=1)
    for _ in range(10):
        moecomm.run_local(lambda comm: main(comm, 1), 2, ranks_per_node=1)
    comm = moecomm.Communicator()
    for number in range(20):  # closed, or only dropped
        buf = moecomm.Buffer(comm, hidden=64, num_experts=8, top_k=2, max_tokens=16)
        if number % 2:
            buf.close()
        del buf
    comm.close()
    assert held() == before
