"""`out` of combine and decode_combine must not overlap memory that the call still reads, on any rank."""

import pytest
import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture

import moecomm

T, H, E, K = 4, 64, 4, 2
SHAPE = dict(hidden=H, num_experts=E, top_k=K, max_tokens=T, dtype=torch.float32)


def inputs(rank):
    """Return inputs with two picks per token, one on each rank, so that every rank gets T rows of each."""
    g = torch.Generator().manual_seed(rank)
    return (
        torch.randn((T, H), generator=g),
        torch.tensor([[0, 2], [1, 3], [0, 3], [1, 2]]),
        torch.rand((T, K), generator=g),
    )


def refused(what, call):
    """Assert that the call raises an InvalidArgument with this message."""
    with pytest.raises(moecomm.InvalidArgument, match=what):
        call()


def test_combine(either_world):  # noqa: F811
    def body(comm):
        x, ids, weights = inputs(comm.rank)
        other = moecomm.Buffer(comm, **SHAPE)
        buf = moecomm.Buffer(comm, **SHAPE, decode=True, arena_bytes=1 << 18)
        kept, out = buf.dispatch(x, ids, weights), buf.dispatch(x, ids, weights)
        received, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
        rows, row_weights = out.x.clone(), out.topk_weights.clone()
        want = x * weights.sum(1, keepdim=True)

        def combine(**how):
            return buf.combine(how.pop("rows", rows), out.handle, **how)

        # A bias, or async_op, selects the slow path.
        for more in ({}, {"topk_weights": row_weights}, {"bias": torch.zeros(H)}, {"async_op": True}):
            for where in (
                out.handle.rows[:T],
                out.x[:T],
                kept.x[:T],
                kept.handle.rows[T : 2 * T],
                received.x[0, :T],
                received.handle.rows[0, :T],
            ):
                refused("out is in a window of this buffer", lambda: combine(out=where, **more))
            refused("out shares memory with rows", lambda: combine(out=rows[T:], **more))
        aliased = torch.cat([row_weights, torch.zeros(T * H - len(row_weights))]).view(T, H)
        refused(
            "out shares memory with topk_weights",
            lambda: combine(out=aliased, topk_weights=aliased.view(-1)[: 2 * T]),
        )
        # Other rows are first copied to handle.rows, so that other inputs must not overlap it.
        inside = out.handle.rows.view(-1)[: 2 * T]
        inside.copy_(row_weights)
        refused(
            "topk_weights is in handle.rows, to which rows are copied", lambda: combine(topk_weights=inside)
        )
        refused("bias is in handle.rows", lambda: combine(bias=out.handle.rows[0]))
        # The calls above moved no data. A window of another buffer is valid.
        place = other.dispatch(x, ids, weights).handle.rows[:T]
        y = combine(topk_weights=row_weights, out=place)
        assert y.data_ptr() == place.data_ptr()
        torch.testing.assert_close(place, want)
        torch.testing.assert_close(combine(topk_weights=out.topk_weights, out=torch.empty(T, H)), want)
        comm.barrier()

    moecomm.run_local(body, 2)


def test_decode_combine(either_world):  # noqa: F811
    def body(comm):
        x, ids, weights = inputs(comm.rank)
        buf = moecomm.Buffer(comm, **SHAPE, decode=True)
        out = buf.dispatch(x, ids)

        def step():
            """Run a step whose experts return their input; a refused combine ends it."""
            received, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
            rows = received.x.clone()
            received.handle.rows.copy_(rows)
            return received, received.handle, rows

        places = (
            lambda recv: recv.handle.rows[0, :T],
            lambda recv: recv.handle.rows[1, -T:],
            lambda recv: recv.x[0, :T],
            lambda _: out.x[:T],
            lambda _: out.handle.rows[:T],
        )
        for apart in (True, False):
            for more in ({}, {"wire": "fp8"}):
                for place in places:
                    received, handle, rows = step()
                    refused(
                        "out is in a window|out shares memory with rows",
                        lambda: buf.decode_combine(
                            rows if apart else handle.rows, ids, weights, handle, out=place(received), **more
                        ),
                    )
        aliased = torch.zeros(T, H)
        aliased.view(-1)[: T * K] = weights.view(-1)
        _, handle, rows = step()
        refused(
            "out shares memory with topk_weights",
            lambda: buf.decode_combine(
                handle.rows, ids, aliased.view(-1)[: T * K].view(T, K), handle, out=aliased
            ),
        )
        _, handle, rows = step()
        refused(
            "topk_ids|topk_weights",
            lambda: buf.decode_combine(rows, ids, handle.rows.view(-1)[: T * K].view(T, K), handle),
        )
        _, handle, _ = step()
        y, _ = buf.decode_combine(handle.rows, ids, weights, handle, out=torch.empty(T, H), return_hook=False)
        torch.testing.assert_close(y, x * weights.sum(1, keepdim=True))
        comm.barrier()

    moecomm.run_local(body, 2)
