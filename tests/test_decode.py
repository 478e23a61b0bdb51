"""The decode path over rank threads, against the oracle, bit for bit."""

import pytest
import torch
from worlds import assert_same, random_world

import moecomm
from moecomm import reference


def step(comm, buf, world, *, num_experts, weights_travel=False, return_hook=True, in_place=True, scales=None):
    """One dispatch -> experts -> combine on this rank, compared with the oracle."""
    xs, ids, weights = world
    rank = comm.rank
    want = reference.decode_dispatch(xs, ids, num_experts=num_experts, max_tokens=buf.max_tokens)
    recv, hook = buf.decode_dispatch(xs[rank], ids[rank], topk_weights=weights[rank] if weights_travel else None, quant=None,
                                     return_hook=return_hook)
    if return_hook:
        hook()
    assert_same(recv.counts, want[rank].counts, f"rank {rank}: counts")
    for e, n in enumerate(want[rank].counts.tolist()):
        assert_same(recv.x[e, :n], want[rank].x[e, :n], f"rank {rank}: x of expert {e}")
    rows = [(w.x.to(torch.float32) * (r + 1) / 4).to(xs[0].dtype) for r, w in enumerate(want)]
    expected = reference.decode_combine(rows, ids, weights, num_experts=num_experts, weights_travel=weights_travel)
    mine = rows[rank]
    if in_place:
        for e, n in enumerate(want[rank].counts.tolist()):
            recv.handle.rows[e, :n] = rows[rank][e, :n]
        mine = recv.handle.rows
    y = torch.full(xs[rank].shape, float("nan"), dtype=xs[0].dtype)
    out, hook = buf.decode_combine(mine, ids[rank], None if weights_travel else weights[rank], recv.handle, return_hook=return_hook, out=y)
    assert out is y
    if return_hook:
        hook()
    assert_same(y, expected[rank], f"rank {rank}: y")


@pytest.mark.parametrize("weights_travel", [False, True])
@pytest.mark.parametrize("nodes,per_node", [(1, 1), (2, 1), (1, 3), (3, 2), (2, 4)])
def test_geometries(nodes, per_node, weights_travel):
    size = nodes * per_node
    worlds = [random_world(size, [(3 + 5 * r + i) % 8 for r in range(size)], 64, 4 * size, 4, seed=i) for i in range(5)]

    def run(comm):
        buf = moecomm.Buffer(comm, hidden=64, num_experts=4 * size, top_k=4, max_tokens=8)
        for i, world in enumerate(worlds):
            step(comm, buf, world, num_experts=4 * size, weights_travel=weights_travel, return_hook=i % 2 == 0, in_place=i % 3 != 0)
        return buf.stats()

    print(moecomm.run_local(run, size, ranks_per_node=per_node, timeout=10)[0])
