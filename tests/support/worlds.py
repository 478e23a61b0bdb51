"""Random inputs, and the comparison with the oracle, for all suites."""

from __future__ import annotations

import torch

import moecomm
from moecomm import reference


def random_ids(tokens, top_k, num_experts, generator, masked=0.2):
    """Make distinct picks per token, some of them -1."""
    ids = torch.rand((tokens, num_experts), generator=generator).argsort(1)[:, :top_k]
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < masked, -1)


def random_world(size, tokens, hidden, num_experts, top_k, dtype=torch.bfloat16, seed=0, masked=0.2):
    """Make (xs, ids, weights) by rank; `tokens` is a count or a list of counts."""
    g = torch.Generator().manual_seed(seed)
    counts = [tokens] * size if isinstance(tokens, int) else tokens
    xs = [torch.randn((t, hidden), generator=g).to(dtype) for t in counts]
    ids = [random_ids(t, top_k, num_experts, g, masked) for t in counts]
    weights = [torch.rand((t, top_k), generator=g) for t in counts]
    return xs, ids, weights


def bits(t):
    """View a tensor as integers, so that NaN equals NaN and -0 differs from 0."""
    return t.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    )


def assert_same(got, want, what):
    """Assert equal shapes, dtypes and bits."""
    assert got.shape == want.shape and got.dtype == want.dtype, (
        f"{what}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    )
    wrong = (bits(got) != bits(want)).nonzero()
    assert not len(wrong), f"{what}: {len(wrong)} elements differ, first at {wrong[0].tolist()}"


def assert_received(out, want, rank):
    """Assert that a Dispatched equals the oracle's Received in every field."""
    for name in (
        "x",
        "scales",
        "topk_weights",
        "topk_ids",
        "tokens_per_expert",
        "rows_per_expert",
        "source_rank",
        "source_token",
    ):
        got, expected = getattr(out, name), getattr(want, name)
        if expected is None:
            assert got is None, f"rank {rank}: {name} is there, expected None"
        else:
            assert_same(got, expected, f"rank {rank}: {name}")


def round_trip(
    comm,
    world,
    *,
    num_experts,
    top_k,
    layout="expert",
    expert_alignment=1,
    capacity=None,
    with_weights=True,
    bias=None,
    in_place=True,
    channels=None,
    max_tokens=None,
):
    """Dispatch and combine one random world on this rank; compare with the oracle; return the buffer's stats."""
    xs, ids, weights = world
    rank, hidden, dtype = comm.rank, xs[0].shape[1], xs[0].dtype
    want = reference.dispatch(
        xs,
        ids,
        weights,
        num_experts=num_experts,
        layout=layout,
        expert_alignment=expert_alignment,
        capacity=capacity,
    )
    buf = moecomm.Buffer(
        comm,
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k,
        max_tokens=max_tokens or max(len(x) for x in xs) or 1,
        dtype=dtype,
        channels=channels,
    )
    out = buf.dispatch(
        xs[rank],
        ids[rank],
        weights[rank],
        layout=layout,
        expert_alignment=expert_alignment,
        capacity=capacity,
    )
    assert_received(out, want[rank], rank)
    # Experts: a function of the row and the rank, computed equally by all ranks.
    rows = [(w.x.to(torch.float32) * (r + 1) / 4).to(dtype) for r, w in enumerate(want)]
    row_weights = [w.topk_weights for w in want] if with_weights and layout == "expert" else None
    expected = reference.combine(
        rows,
        want,
        [len(x) for x in xs],
        ranks_per_node=comm.ranks_per_node,
        topk_weights=row_weights,
        bias=None if bias is None else [bias] * comm.size,
    )
    if in_place:
        out.handle.rows.copy_(rows[rank])
    y = torch.full(xs[rank].shape, float("nan"), dtype=dtype)
    buf.combine(
        out.handle.rows if in_place else rows[rank].clone(),
        out.handle,
        bias=bias,
        out=y,
        topk_weights=out.topk_weights if row_weights else None,
    )
    assert_same(y, expected[rank], f"rank {rank}: y")
    stats = buf.stats()
    comm.barrier()
    buf.close()
    return stats
