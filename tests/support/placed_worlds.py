"""Worlds with replicated experts: skewed loads, and dispatch by logical ids against the oracle."""

import numpy as np
import torch
from worlds import assert_received, assert_same, random_world

import moecomm
from moecomm import reference
from moecomm.balance import rebalance

EXPERTS, TOP_K = 12, 4


def skewed_world(size, tokens, seed=0, experts=EXPERTS, top_k=TOP_K, hidden=32):
    """Make a random world whose picks follow Zipf's law."""
    xs, _, weights = random_world(size, tokens, hidden, experts, top_k, seed=seed)
    g = torch.Generator().manual_seed(seed)
    chance = 1.0 / torch.arange(1, experts + 1)
    ids = [
        torch.multinomial(chance.expand(len(x), experts), top_k, generator=g)
        if len(x)
        else torch.zeros((0, top_k), dtype=torch.int64)
        for x in xs
    ]
    ids = [i.masked_fill(torch.rand(i.shape, generator=g) < 0.1, -1) for i in ids]
    return xs, ids, weights


def load_of(ids, experts=EXPERTS):
    """Return the picks per expert of all ranks, [1, E]."""
    every = torch.cat([i.flatten() for i in ids])
    return torch.bincount(every[every >= 0], minlength=experts)[None].double()


def placed(ids, size, nodes=1, per_rank=None, experts=EXPERTS, **options):
    """Make a placement for this load with two spare slots per rank (none on a single rank)."""
    return rebalance(
        load_of(ids, experts) + 1,
        num_replicas=size * (per_rank or min(experts, experts // size + 2)),
        num_nodes=nodes,
        num_ranks=size,
        **options,
    )


def physical_ids(outs, placement, ids):
    """Infer from the received rows the physical ids that each source sent: [T, K] per source, -1 elsewhere."""
    sent = [torch.full_like(i, -1) for i in ids]
    for rank, (source, token, counts) in enumerate(outs):
        slot = rank * placement.slots_per_rank + torch.repeat_interleave(
            torch.arange(placement.slots_per_rank), counts
        )
        for s, t, p in zip(source.tolist(), token.tolist(), slot.tolist()):
            expert = int(placement.physical_to_logical[0, p])
            k = ids[s][t].tolist().index(expert)  # the token picks this expert
            assert sent[s][t, k] == -1, "a pick is served once"
            sent[s][t, k] = p
    return sent


def run(world, placement, mode, nodes=1, **options):
    """Run dispatch and combine on all ranks against the oracle; return the physical ids and rows per rank."""
    xs, ids, weights = world
    size = len(xs)

    def rank_main(comm):
        buf = moecomm.Buffer(
            comm,
            hidden=32,
            num_experts=placement.num_experts,
            top_k=ids[0].shape[1],
            max_tokens=max(map(len, xs)) or 1,
            placement=placement,
            replicas=mode,
            **options,
        )
        r = comm.rank
        out = buf.dispatch(xs[r], ids[r], weights[r])
        out.handle.rows.copy_((out.x.float() * 0.5).bfloat16())
        y = buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights)
        assert torch.equal(out.lost_weight, torch.zeros(len(xs[r])))
        comm.barrier()
        return out, y

    outs = moecomm.run_local(rank_main, size, ranks_per_node=size // nodes)
    sent = physical_ids(
        [(o.source_rank, o.source_token, o.tokens_per_expert) for o, _ in outs], placement, ids
    )
    for s in range(size):
        assert torch.equal(sent[s] >= 0, ids[s] >= 0), "every pick is served"
    want = reference.dispatch(xs, sent, weights, num_experts=placement.num_slots)
    rows = [(w.x.float() * 0.5).bfloat16() for w in want]
    y = reference.combine(
        rows,
        want,
        [len(x) for x in xs],
        ranks_per_node=size // nodes,
        topk_weights=[w.topk_weights for w in want],
    )
    for r, (out, got) in enumerate(outs):
        assert_received(out, want[r], r)
        assert_same(got, y[r], f"rank {r}: y")
    return sent, np.array([len(w.x) for w in want])
