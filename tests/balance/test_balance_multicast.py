"""Migration by multicast: an expert with several new replicas is sent to each node once."""

import pytest
import torch
from worlds import assert_same

import moecomm
from moecomm.balance import Placement
from moecomm.balance.multicast import Group, grouped

EXPERTS, PER_RANK, HIDDEN = 12, 3, 7168


def placements():
    """Return placements: expert 0 has a replica in each node, and gets more in both."""
    old = torch.arange(24).view(1, 24) % EXPERTS
    new = old.clone()
    new[0, [5, 8, 15, 18]] = 0  # of ranks 1, 2, 5 and 6
    before = Placement(old, EXPERTS, 8, 2)
    return before, Placement(new, EXPERTS, 8, 2, version=1, previous=before)


def spread():
    """Return placements: expert 0 is only in node 0, then also on every rank of node 1."""
    old = torch.tensor([[*range(12), 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1]])
    new = old.clone()
    new[0, 12::3] = 0
    before = Placement(old, EXPERTS, 8, 2)
    return before, Placement(new, EXPERTS, 8, 2, version=1, previous=before)


def test_far_slots_get_an_expert_from_one_root():
    # Three slots per rank, two ranks per node. Expert 0 is on ranks 0 and 1; ranks 2, 3 (far) and 1 (near) get it.
    moves = [(5, 7, 0), (6, 7, 1), (9, 7, 4), (10, 8, 11)]
    assert grouped(moves, 3, 2) == [Group(0, 0, {1: 2}), Group(0, 1, {2: 0, 3: 0})]


@pytest.mark.parametrize("make", [placements, spread])
def test_bytes_on_the_rail_fall_from_replicas_to_nodes(make):
    old, new = make()
    size = HIDDEN * 4 + 8

    def main(comm):
        n = comm.rank * PER_RANK
        experts = old.physical_to_logical[0, n : n + PER_RANK]
        local = [[experts[:, None].float().expand(-1, HIDDEN).contiguous(), experts.clone()]]
        pending = new.migrate(local, comm)
        rows, ids = pending.wait()[0]
        want = new.physical_to_logical[0, n : n + PER_RANK]
        assert_same(ids, want, "ids")
        assert_same(rows, want[:, None].float().expand(-1, HIDDEN).contiguous(), "rows")
        return pending.traffic

    traffic = moecomm.run_local(main, 8, ranks_per_node=4)
    replicas = 0  # bytes over the rail if each slot were sent separately
    nodes = set()
    for _, slot, expert, source in new.moves.tolist():
        if slot // 12 != source // 12:
            replicas += 1
            nodes.add((expert, slot // 12))
    moved = [
        sum(t[hop][kind] for t in traffic)
        for hop, kind in (("rail", "physical_bytes"), ("rail", "logical_bytes"))
    ]
    assert moved == [len(nodes) * size, replicas * size]
    assert (len(nodes), replicas) == ((1, 4) if make is spread else (0, 0))
