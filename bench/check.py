"""Expected results of dispatch and combine of all ranks, computed fast enough to verify every timed result.

moecomm/testing/reference.py computes the same slowly; a test compares the two bit for bit.
"""

from __future__ import annotations

import torch

from moecomm._native import core

_CHUNK = 64  # number of tokens whose data fits into the cache


def received_order(ids, rank, *, num_experts, layout):
    """(source rank, source token) int64 of every row that this rank receives, from ids by rank [T, top_k]."""
    per_rank = num_experts // len(ids)
    keys = []
    for source, picks in enumerate(ids):
        mine = (picks >= rank * per_rank) & (picks < (rank + 1) * per_rank)
        if layout == "rank":
            token = mine.any(1).nonzero().flatten()
            keys.append(torch.stack([torch.zeros_like(token), torch.full_like(token, source), token]))
        else:
            token, slot = mine.nonzero().unbind(1)
            keys.append(torch.stack([picks[token, slot], torch.full_like(token, source), token]))
    expert, source, token = torch.cat(keys, 1)
    order = expert.argsort(stable=True)  # rows of an expert are already sorted by source, then token
    return source[order], token[order]


def expert_output(rows, rank, out):
    """Output of the benchmark's experts of a rank: differs between ranks, and is exactly reproducible."""
    return torch.mul(rows, (rank + 1) / 4, out=out)


def terms_of(ids, weights, *, num_experts, size, layout):
    """Terms of each token's sum in order: (rank int64 [T, K], weight [T, K], whether the term exists [T, K])."""
    big = torch.where(ids < 0, num_experts, ids)
    ordered, slots = big.sort(1)
    there = ordered < num_experts
    rank = ordered // (num_experts // size)
    if layout == "rank":  # one row per token and rank, without weights
        there = there.clone()
        there[:, 1:] &= rank[:, 1:] != rank[:, :-1]
        return rank, torch.ones(ids.shape), there
    return rank, weights.gather(1, slots), there


def combined(x, ids, weights, *, num_experts, size, layout, group_of, rounded):
    """Expected y [T, hidden] of one rank's tokens, with expert_output as experts.

    group_of : list of int by rank
        Rows of the ranks of one group are summed first, groups in ascending order.
    rounded : list of bool by group
        Whether the sum of the group is rounded to the dtype of the rows before it is added.
    """
    rank, weight, there = terms_of(ids, weights, num_experts=num_experts, size=size, layout=layout)
    groups = torch.tensor([*group_of, -1])
    is_rounded = torch.tensor([*rounded, False])
    y = torch.empty_like(x)
    for begin in range(0, len(x), _CHUNK):
        own = slice(begin, begin + _CHUNK)
        y[own] = _sum_chunk(x[own], rank[own], weight[own], there[own], groups, is_rounded).to(x.dtype)
    return y


def _sum_chunk(x, rank, weight, there, groups, is_rounded):
    tokens = len(x)
    total, part = torch.zeros(x.shape), torch.zeros(x.shape)
    has_total, has_part = (
        torch.zeros((tokens, 1), dtype=torch.bool),
        torch.zeros((tokens, 1), dtype=torch.bool),
    )
    group = torch.full((tokens,), -1)

    def close(which):
        """Add the complete parts of the tokens `which` to their totals."""
        which = which[:, None] & has_part
        done = torch.where(is_rounded[group][:, None], part.to(x.dtype).float(), part)
        total.copy_(torch.where(which, torch.where(has_total, total + done, done), total))
        has_total.logical_or_(which)
        has_part.logical_and_(~which)

    scale = (torch.arange(1, len(groups) + 1) / 4).tolist()
    factor = torch.tensor(scale)
    for k in range(rank.shape[1]):
        here = there[:, k]
        if not here.any():
            continue
        r = torch.where(here, rank[:, k], len(groups) - 1)
        changes = here & (groups[r] != group)
        if changes.any():
            close(changes)
            group = torch.where(changes, groups[r], group)
        term = (x.float() * factor[r][:, None]).to(x.dtype).float() * weight[:, k, None]
        part.copy_(torch.where(here[:, None], torch.where(has_part, part + term, term), part))
        has_part |= here[:, None]
    close(torch.ones(tokens, dtype=torch.bool))
    return total


def count_wrong(got, want, index=None):
    """Number of elements of got [N, H] whose bits differ from want[index], or from want if index is None."""
    rows = len(got)
    if (
        got.dtype != want.dtype
        or got.shape[1:] != want.shape[1:]
        or rows != (len(want) if index is None else len(index))
    ):
        return max(got.numel(), 1)
    if rows == 0:
        return 0
    index = torch.arange(rows) if index is None else index
    return core.count_different(
        got.data_ptr(), want.data_ptr(), index.data_ptr(), rows, got.shape[1], got.element_size()
    )
