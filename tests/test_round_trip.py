"""Dispatch and combine over rank threads, against the oracle, bit for bit."""

import pytest
from worlds import random_world, round_trip

import moecomm

GEOMETRIES = [(1, 1), (2, 1), (1, 3), (3, 2), (2, 4), (5, 1)]   # nodes x ranks per node


@pytest.mark.parametrize("nodes,per_node", GEOMETRIES)
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_geometries(nodes, per_node, layout):
    size = nodes * per_node
    world = random_world(size, [3 + 5 * r % 11 for r in range(size)], 64, 4 * size, 4, seed=nodes * 10 + per_node)
    moecomm.run_local(lambda comm: round_trip(comm, world, num_experts=4 * size, top_k=4, layout=layout), size, ranks_per_node=per_node)
