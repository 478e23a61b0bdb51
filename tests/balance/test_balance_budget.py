"""rebalance with a budget of bytes: its limit, its benefit, and the bytes of the following migration."""

import pytest
import torch

import moecomm
from moecomm import InvalidArgument
from moecomm.balance import rebalance

LAYERS, EXPERTS, SLOTS, RANKS, NODES = 5, 16, 24, 8, 2
SHAPE = dict(num_replicas=SLOTS, num_ranks=RANKS, num_nodes=NODES)


def loads(seed):
    """Return skewed loads at two times."""
    g = torch.Generator().manual_seed(seed)
    return [torch.rand((LAYERS, EXPERTS), generator=g).double() ** 4 + 0.01 for _ in range(2)]


@pytest.mark.parametrize("seed", range(6))
def test_no_budget_is_exceeded_and_more_of_it_is_never_worse(seed):
    before, now = loads(seed)
    old = rebalance(before, **SHAPE)
    free = rebalance(now, **SHAPE, previous=old)
    sizes = [100 * (1 + layer) for layer in range(LAYERS)]
    whole = rebalance(now, **SHAPE, previous=old, bytes_per_expert=sizes, budget=1 << 40)
    heaviest = (free.rank_load(now).max(1).values, old.rank_load(now).max(1).values)
    assert torch.equal(whole.rank_load(now).max(1).values, torch.minimum(*heaviest))
    total = whole.paid.rail_bytes + whole.paid.node_bytes
    last = None
    for share in (0, 0.1, 0.3, 0.6, 1):
        p = rebalance(now, **SHAPE, previous=old, bytes_per_expert=sizes, budget=int(share * total))
        paid = p.paid
        assert paid.rail_bytes + paid.node_bytes <= paid.budget == int(share * total)
        load = p.rank_load(now)
        assert torch.allclose(paid.imbalance, load.max(1).values / load.mean(1))
        assert (paid.imbalance <= paid.before + 1e-12).all()
        worse = paid.imbalance * now.sum(1)
        assert last is None or worse.sum() <= last.sum() + 1e-9
        last = worse
        if share == 0:
            assert torch.equal(p.physical_to_logical, old.physical_to_logical) and len(p.moves) == 0
        assert p.version == old.version + 1
    assert torch.allclose(paid.imbalance, whole.paid.imbalance)


def test_migration_moves_what_was_paid():
    before, now = loads(11)
    old = rebalance(before, **SHAPE)
    size = 64 * 4
    p = rebalance(now, **SHAPE, previous=old, bytes_per_expert=size, budget=40 * size)
    assert 0 < p.paid.rail_bytes + p.paid.node_bytes <= 40 * size

    def main(comm):
        local = [torch.zeros(SLOTS // RANKS, 64) for _ in range(LAYERS)]
        pending = p.migrate(local, comm)
        pending.wait()
        return pending.traffic

    traffic = moecomm.run_local(main, RANKS, ranks_per_node=RANKS // NODES)
    assert sum(t["rail"]["physical_bytes"] for t in traffic) == p.paid.rail_bytes
    assert sum(t["node"]["physical_bytes"] for t in traffic) == p.paid.node_bytes


def test_no_budget_says_nothing_of_bytes():
    before, now = loads(1)
    old = rebalance(before, **SHAPE)
    assert old.paid is None and rebalance(now, **SHAPE, previous=old).paid is None


@pytest.mark.parametrize(
    "wrong,text",
    [
        (dict(budget=5), "bytes_per_expert is None"),
        (dict(bytes_per_expert=5), "budget is None"),
        (dict(bytes_per_expert=-1, budget=5), "bytes_per_expert is -1"),
        (dict(bytes_per_expert=[1, 2], budget=5), "expected one int per layer, 5"),
        (dict(bytes_per_expert=1, budget=-5), "budget is -5"),
        (dict(bytes_per_expert=1, budget=5, previous=None), "a Placement, because a budget is given"),
    ],
)
def test_what_is_wrong_is_named(wrong, text):
    before, now = loads(2)
    old = rebalance(before, **SHAPE)
    with pytest.raises(InvalidArgument, match=text):
        rebalance(now, **{**SHAPE, "previous": old, **wrong})
