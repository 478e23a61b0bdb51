"""One decode step on one rank against the oracle, bit for bit; for rank threads and for processes."""

from __future__ import annotations

import torch
from worlds import assert_same

import moecomm
from moecomm import quant, reference, reference_quant


def make_buffer(comm, world, **arguments):
    """Make a buffer with space for the steps of the world."""
    xs, ids, _ = world
    options = dict(
        hidden=xs[0].shape[1],
        num_experts=4 * comm.size,
        top_k=ids[0].shape[1],
        dtype=xs[0].dtype,
        max_tokens=8,
        arena_bytes=1 << 16,
    )
    return moecomm.Buffer(comm, **{**options, **arguments})


def coded(x, scheme):
    """Return (codes, scales) of the oracle, with scales packed as in a message."""
    codes, scales = reference_quant.quantize(x, scale="ue8m0" if scheme == "fp8_ue8m0" else "f32")
    return codes, quant.pack_ue8m0(scales) if scheme == "fp8_ue8m0" else scales


def check_dispatch(
    comm,
    buf,
    world,
    *,
    scheme=None,
    prepared=False,
    weights_travel=False,
    return_hook=True,
    scale_layout="row",
):
    """Check decode_dispatch of one random world; return its result and that of the oracle.

    With `prepared`, x is quantized before the call.
    """
    xs, ids, weights = world
    r = comm.rank
    rows = [coded(x, scheme) for x in xs] if scheme else [(x, None) for x in xs]
    want = reference.decode_dispatch(
        [x for x, _ in rows],
        ids,
        num_experts=buf.num_experts,
        max_tokens=buf.decode_max_tokens,
        scales=[s for _, s in rows] if scheme else None,
    )
    recv, hook = buf.decode_dispatch(
        rows[r] if prepared else xs[r],
        ids[r],
        topk_weights=weights[r] if weights_travel else None,
        quant=None if prepared else scheme,
        scale_layout=scale_layout,
        return_hook=return_hook,
    )
    assert (hook is not None) == return_hook
    if hook:
        hook()
    assert_same(recv.counts, want[r].counts, f"rank {r}: counts")
    assert (recv.scales is None) == (scheme is None)
    for e, n in enumerate(want[r].counts.tolist()):
        assert_same(recv.x[e, :n], want[r].x[e, :n], f"rank {r}: x of expert {e}")
        if scheme:
            assert_same(recv.scales[e, :n], want[r].scales[e, :n], f"rank {r}: scales of expert {e}")
    return recv, want


def check_step(comm, buf, world, *, in_place=True, wire=None, weights_travel=False, return_hook=True, **how):
    """Run dispatch, experts and combine, with outputs filled with NaN before; return y."""
    xs, ids, weights = world
    r, dtype = comm.rank, xs[0].dtype
    recv, want = check_dispatch(
        comm, buf, world, weights_travel=weights_travel, return_hook=return_hook, **how
    )
    # Experts: a function of the row and the rank, computed equally by all ranks.
    rows = [(w.x.to(torch.float32) * (rank + 1) / 4).to(dtype) for rank, w in enumerate(want)]
    expected = reference.decode_combine(
        rows,
        ids,
        weights,
        num_experts=buf.num_experts,
        weights_travel=weights_travel,
        ranks_per_node=comm.ranks_per_node,
        wire=reference_quant.wire(wire),
    )
    mine = rows[r]
    if in_place:
        mine = recv.handle.rows
        for e, n in enumerate(recv.counts.tolist()):
            mine[e, :n] = rows[r][e, :n]
    y = torch.full(xs[r].shape, float("nan"), dtype=dtype)
    out, hook = buf.decode_combine(
        mine,
        ids[r],
        None if weights_travel else weights[r],
        recv.handle,
        wire=wire,
        return_hook=return_hook,
        out=y,
    )
    assert out is y and (hook is not None) == return_hook
    if hook:
        hook()
    assert_same(y, expected[r], f"rank {r}: y")
    return y
