"""Decode steps of ranks of which some are masked, and what the oracle says of them."""

from __future__ import annotations

import torch
from worlds import assert_same

from moecomm import reference


def without(masked, xs, ids, num_experts):
    """(xs, ids) as they count where ranks are masked: no tokens of theirs, no picks of their experts."""
    per_rank = num_experts // len(xs)
    gone = torch.zeros(len(xs), dtype=torch.bool)
    gone[list(masked)] = True
    xs = [x[:0] if gone[r] else x for r, x in enumerate(xs)]
    ids = [i[:0] if gone[r] else i for r, i in enumerate(ids)]
    return xs, [i.masked_fill((i >= 0) & gone[i.clamp(min=0) // per_rank], -1) for i in ids]


def oracle(masked, xs, ids, weights, num_experts, max_tokens, ranks_per_node, travel=False):
    """(DecodeReceived by rank, y by rank) of a step whose experts hand back what they got."""
    xs, ids = without(masked, xs, ids, num_experts)
    weights = [w[: len(x)] for w, x in zip(weights, xs)]
    want = reference.decode_dispatch(xs, ids, num_experts=num_experts, max_tokens=max_tokens)
    ys = reference.decode_combine(
        [w.x for w in want],
        ids,
        weights,
        num_experts=num_experts,
        ranks_per_node=ranks_per_node,
        weights_travel=travel,
    )
    return want, ys


def step(buf, x, ids, weights, travel=False, out=None):
    """(DecodeReceived, y) of one step on this rank."""
    recv, _ = buf.decode_dispatch(
        x, ids, topk_weights=weights if travel else None, quant=None, return_hook=False
    )
    recv.handle.rows.copy_(recv.x)
    y, _ = buf.decode_combine(
        recv.handle.rows, ids, None if travel else weights, recv.handle, return_hook=False, out=out
    )
    return recv, y


def check(rank, recv, y, want, ys, what):
    """Compare a step with the oracle, bit by bit."""
    assert recv.counts.tolist() == want[rank].counts.tolist(), f"{what}: counts on rank {rank}"
    for e, n in enumerate(recv.counts.tolist()):
        assert_same(recv.x[e, :n], want[rank].x[e, :n], f"{what}: rows of expert {e} on rank {rank}")
    assert_same(y, ys[rank], f"{what}: y on rank {rank}")
