"""The sim world: equal to the oracle with payload, equal to the cpu world in what it counts."""

import pytest
import torch
from worlds import assert_received, assert_same, random_world, round_trip

import moecomm
from moecomm import reference, sim

GEOMETRIES = [(1, 1), (2, 1), (1, 3), (3, 2), (2, 4)]   # nodes x ranks per node


def cluster_of(world, size, per_node, **more):
    xs, ids, _ = world
    return sim.Cluster(size, ranks_per_node=per_node, hidden=xs[0].shape[1], num_experts=4 * size, top_k=ids[0].shape[1],
                       max_tokens=max(map(len, xs)), dtype=xs[0].dtype, num_sms=4, channels=2, **more)


@pytest.mark.parametrize("nodes,per_node", GEOMETRIES)
@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("seed", [None, 5])
def test_equals_oracle(nodes, per_node, layout, seed):
    """Calm or perturbed, the rows that arrive and the sums that return are the oracle's."""
    size = nodes * per_node
    world = random_world(size, [3 + 5 * r % 11 for r in range(size)], 64, 4 * size, 4, seed=nodes * 10 + per_node)
    xs, ids, weights = world
    c = cluster_of(world, size, per_node, payload=True)
    c.reset(seed)
    want = reference.dispatch(xs, ids, weights, num_experts=4 * size, layout=layout)
    got = c.dispatch(xs, ids, weights, layout=layout)
    for rank in range(size):
        assert_received(got[rank], want[rank], rank)
    rows = [(w.x.float() * (r + 1) / 4).to(w.x.dtype) for r, w in enumerate(want)]
    row_weights = [w.topk_weights for w in want] if layout == "expert" else None
    expected = reference.combine(rows, want, [len(x) for x in xs], ranks_per_node=per_node, topk_weights=row_weights)
    ys = c.combine(rows, topk_weights=row_weights, num_tokens=[len(x) for x in xs])
    for rank in range(size):
        assert_same(ys[rank], expected[rank], f"rank {rank}: y")


@pytest.mark.parametrize("nodes,per_node", [(1, 3), (3, 2), (2, 4)])
@pytest.mark.parametrize("payload", [True, False])
def test_counts_equal_cpu_world(nodes, per_node, payload):
    """Rows and bytes per hop: what crosses the modelled links is what the protocol says, and what the cpu world counts."""
    size = nodes * per_node
    world = random_world(size, [3 + 5 * r % 11 for r in range(size)], 64, 4 * size, 4, seed=7)
    xs, ids, weights = world
    real = moecomm.run_local(lambda comm: round_trip(comm, world, num_experts=4 * size, top_k=4), size, ranks_per_node=per_node)
    c = cluster_of(world, size, per_node, payload=payload)
    p = c.program()
    p.dispatch(ids, weights, xs=xs if payload else None)
    p.combine()
    c.run(p)
    for rank in range(size):
        mine, crossed = c.stats()[rank], c.links()[rank]
        for hop in ("rail", "node"):
            assert mine[hop] == real[rank][hop], f"rank {rank}, {hop}: {mine[hop]}, in the cpu world {real[rank][hop]}"
            assert crossed[hop]["row_bytes"] == real[rank][hop]["physical_bytes"], f"rank {rank}, {hop}: {crossed[hop]}"
        assert crossed["node"]["rows"] == real[rank]["node"]["physical_rows"]
        assert mine["replicated_rows"] == real[rank]["replicated_rows"]
