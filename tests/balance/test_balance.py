"""The static placement: complete tables, known optima, bounded moves, special cases, and typed errors."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moecomm
from bench.balance_baseline import best_pairs
from moecomm.balance import Placement, rebalance, rebalance_experts


def lognormal(layers, experts, sigma=1.0, seed=0):
    """Make loads [layers, experts]."""
    return np.random.default_rng(seed).lognormal(0, sigma, (layers, experts))


def sets_of(placement):
    """Return the experts of every (layer, rank), as sorted lists."""
    return placement.physical_to_logical.view(placement.num_layers, placement.num_ranks, -1).sort(-1).values


def check_tables(p):
    """The three tables agree."""
    layers, slots = p.physical_to_logical.shape
    for layer in range(layers):
        for e in range(p.num_experts):
            held = [s for s in range(slots) if p.physical_to_logical[layer, s] == e]
            n = int(p.replica_count[layer, e])
            assert n == len(held) >= 1
            assert p.logical_to_physical[layer, e].tolist() == held + [-1] * (
                p.logical_to_physical.shape[2] - n
            )
    sets = sets_of(p)
    assert (sets[..., 1:] > sets[..., :-1]).all(), "no rank holds an expert twice"


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 9),
    per_rank=st.integers(1, 5),
    experts=st.integers(1, 20),
    sigma=st.sampled_from([0, 0.5, 1, 3]),
    seed=st.integers(0, 99),
)
def test_any_shape(ranks, per_rank, experts, sigma, seed):
    slots = ranks * per_rank
    if not experts <= slots <= experts * ranks or per_rank > experts:
        with pytest.raises(moecomm.InvalidArgument, match="num_replicas"):
            rebalance(lognormal(2, experts, sigma, seed), num_replicas=slots, num_ranks=ranks)
        return
    load = lognormal(2, experts, sigma, seed)
    p = rebalance(load, num_replicas=slots, num_ranks=ranks)
    check_tables(p)
    q = rebalance(load[::-1], num_replicas=slots, num_ranks=ranks, previous=p, max_moves=1)
    check_tables(q)
    per_rank_moves = (p.physical_to_logical != q.physical_to_logical).view(2, ranks, -1).sum(-1)
    assert per_rank_moves.max() <= 1 and q.balancedness(load[::-1]) >= p.balancedness(load[::-1]) - 1e-12


def test_groups_stay_in_their_node():
    p = rebalance(lognormal(3, 64), num_replicas=96, num_groups=8, num_nodes=4, num_ranks=16)
    node = torch.arange(96) // 24
    for layer in range(3):
        for group in range(8):
            assert len(set(node[p.physical_to_logical[layer] // 8 == group].tolist())) == 1


def test_quality_where_it_is_known():
    """With enough freedom for swaps: within 0.1 % of the mean. Node loads limit placements with groups."""
    load = lognormal(4, 256)
    assert rebalance(load, num_replicas=288, num_ranks=32).balancedness(load) > 0.999
    groups = np.sort(load.reshape(4, 8, 32).sum(2), 1)
    bound = (load.sum(1) / 4 / (groups[:, :4] + groups[:, :3:-1]).max(1)).mean()
    assert (
        bound
        >= rebalance(load, num_replicas=288, num_groups=8, num_nodes=4, num_ranks=32).balancedness(load)
        > 0.999 * bound
    )


def test_drift_with_bounded_moves():
    load = lognormal(4, 256)
    p = rebalance(load, num_replicas=288, num_ranks=32)
    drifted = load * lognormal(4, 256, 0.2, seed=1)
    stale = p.balancedness(drifted)
    quality = [
        rebalance(drifted, num_replicas=288, num_ranks=32, previous=p, max_moves=n).balancedness(drifted)
        for n in (0, 1, 2)
    ]
    assert quality[0] == stale < 0.9 and quality[1] > 0.97 and quality[2] > 0.99


@pytest.mark.parametrize(
    "experts,ranks,sigma,near", [(256, 144, 1.0, 0.998), (5, 4, 1.0, 0.95), (9, 6, 0.5, 0.95)]
)
def test_two_slots_per_rank_against_the_integer_program(experts, ranks, sigma, near):
    load = lognormal(1, experts, sigma, seed=3)
    p = rebalance(load, num_replicas=2 * ranks, num_ranks=ranks)
    best = best_pairs(load[0], ranks)
    assert near * best <= p.balancedness(load) <= 1.001 * best


def test_one_slot_per_rank_is_optimal_and_moves_little():
    """320 ranks, 256 experts and a shared one that every token picks.

    The placement is as good as splitting the hottest experts, and most ranks keep their experts.
    """
    load = lognormal(6, 256)
    load = np.concatenate([load, load.sum(1, keepdims=True) / 8], 1)
    later = load * np.concatenate([lognormal(6, 256, 0.2, 1), np.ones((6, 1))], 1)
    p = rebalance(load, num_replicas=320, num_ranks=320)
    q = rebalance(later, num_replicas=320, num_ranks=320, previous=p)
    for w, heaviest in zip(later, q.rank_load(later).max(1).values):
        count = np.ones(257)
        for _ in range(320 - 257):
            count[np.argmax(w / count)] += 1
        assert float(heaviest) == pytest.approx((w / count).max(), rel=1e-12)
    assert len(q.moves) <= 0.03 * 6 * 320


@pytest.mark.parametrize("experts,slots,ranks", [(256, 288, 32), (32, 40, 8), (12, 24, 4)])
def test_connected_placements_join_all_ranks(experts, slots, ranks):
    load = lognormal(4, experts, 1.0, seed=ranks)
    p = rebalance(load, num_replicas=slots, num_ranks=ranks, connected=True)
    assert (sets_of(p).diff(dim=-1) > 0).all(), "no rank holds an expert twice"
    for table in p.physical_to_logical.view(4, ranks, -1):
        reached, todo = {0}, [0]
        while todo:
            held = set(table[todo.pop()].tolist())
            near = {r for r in range(ranks) if held & set(table[r].tolist())} - reached
            reached |= near
            todo += near
        assert len(reached) == ranks
    assert p.balancedness(load) > 0.97


# -- traps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "experts,slots,ranks", [(8, 12, 4), (8, 8, 8), (8, 16, 8), (3, 9, 3), (256, 288, 32)]
)
def test_loads_of_zero(experts, slots, ranks):
    p = rebalance(np.zeros((2, experts)), num_replicas=slots, num_ranks=ranks)
    check_tables(p)
    assert p.balancedness(np.zeros((2, experts))) == 1.0
    assert p.replica_count.max() - p.replica_count.min() <= 1, "without load, replicas spread evenly"


def test_an_expert_hotter_than_all_ranks_has_one_replica_on_each():
    load = np.full((1, 8), 1e-6)
    load[0, 3] = 1.0
    p = rebalance(load, num_replicas=12, num_ranks=4)
    check_tables(p)
    assert p.replica_count[0, 3] == 4, "never two replicas on one rank"


def test_leftover_replicas_go_to_cold_experts():
    """No expert exceeds the mean of 3.75: replicas of a hot expert would only displace small ones."""
    load = np.array([[3.5, 3.5, 3.5, 3.5, 0.5, 0.5]])
    p = rebalance(load, num_replicas=8, num_ranks=4)
    assert p.replica_count.tolist() == [[1, 1, 1, 1, 2, 2]] and p.balancedness(load) == 1.0


# -- what follows from previous ---------------------------------------------------------------------


def test_moves_name_the_slots_that_change_and_where_the_weights_are():
    p = rebalance(lognormal(2, 16), num_replicas=24, num_nodes=2, num_ranks=4)
    q = rebalance(lognormal(2, 16, seed=5), num_replicas=24, num_nodes=2, num_ranks=4, previous=p)
    assert q.version == p.version + 1 and len(p.moves) == 0
    now = p.physical_to_logical.clone()
    for layer, slot, expert, source in q.moves.tolist():
        assert p.physical_to_logical[layer, source] == expert
        in_node = [
            s for s in p.logical_to_physical[layer, expert].tolist() if s >= 0 and s // 12 == slot // 12
        ]
        assert source in (in_node or p.logical_to_physical[layer, expert].tolist())
        now[layer, slot] = expert
    assert torch.equal(now, q.physical_to_logical)
    same = rebalance(lognormal(2, 16, seed=5), num_replicas=24, num_nodes=2, num_ranks=4, previous=q)
    assert len(same.moves) == 0, "the same load moves nothing"


def test_relabelling_is_the_best_assignment():
    from scipy.optimize import linear_sum_assignment

    load = lognormal(3, 64)
    kept = best = 0
    p = rebalance(load, num_replicas=72, num_ranks=36)
    q = rebalance(load * lognormal(3, 64, 0.3, 2), num_replicas=72, num_ranks=36, previous=p)
    for old, new in zip(sets_of(p), sets_of(q)):
        overlap = np.array([[len(set(a) & set(b)) for b in new.tolist()] for a in old.tolist()])
        kept += np.trace(overlap)
        best += overlap[linear_sum_assignment(-overlap)].sum()
    assert kept == best > 0


def test_the_signature_that_engines_call():
    weight = torch.from_numpy(lognormal(2, 16))
    physical, logical, count = rebalance_experts(weight, 24, 4, 2, 4)
    assert physical.shape == (2, 24) and count.shape == (2, 16) and logical.shape == (2, 16, int(count.max()))
    assert {t.dtype for t in (physical, logical, count)} == {torch.int64}
    check_tables(Placement(physical, 16, 4, 2))
    for layer, e in itertools.product(range(2), range(16)):
        held = (physical[layer] == e).nonzero().flatten().tolist()
        assert len(held) == count[layer, e] and logical[layer, e].tolist() == held + [-1] * (
            logical.shape[2] - len(held)
        )
        assert len({p // 12 for p in (physical[layer] // 4 == e // 4).nonzero().flatten().tolist()}) == 1, (
            "groups stay in a node"
        )
    named = rebalance_experts(
        weight=(weight * 100).long(), num_replicas=24, num_groups=4, num_nodes=2, num_gpus=4
    )  # also with moves as counts
    assert [t.shape[:2] for t in named] == [(2, 24), (2, 16), (2, 16)]
    assert rebalance_experts(weight, 24, 1, 2, 4)[0].shape == (2, 24), (
        "groups that do not divide over the nodes: no such limit"
    )


@pytest.mark.parametrize("slots, groups, nodes, ranks, experts", [(72, 1, 1, 8, 8), (80, 4, 2, 8, 16)])
def test_a_rank_with_more_slots_than_experts_holds_some_twice(slots, groups, nodes, ranks, experts):
    """EPLB accepts this, so rebalance does; Placement, which dispatch uses, does not."""
    weight = torch.from_numpy(lognormal(3, experts))
    physical, logical, count = rebalance_experts(weight, slots, groups, nodes, ranks)
    assert {t.dtype for t in (physical, logical, count)} == {torch.int64} and (count.sum(1) == slots).all()
    own = experts // nodes if groups > 1 else experts
    for layer in range(3):
        for rank, held in enumerate(physical[layer].view(ranks, -1).tolist()):
            assert len(set(held)) == own and len(held) == slots // ranks, f"rank {rank} holds all it can"
            again = held[own:]
            assert again[0] == max(set(held), key=lambda e: weight[layer, e]), "the heaviest comes first"
        for e in range(experts):
            places = (physical[layer] == e).nonzero().flatten().tolist()
            got = logical[layer, e].tolist()
            assert got == places + [-1] * (len(got) - len(places)) and len(places) == count[layer, e]
    with pytest.raises(moecomm.InvalidArgument, match="multiple of the"):
        rebalance_experts(weight, slots + 1, groups, nodes, ranks)


@pytest.mark.parametrize(
    "name,changes",
    [
        ("num_replicas", dict(num_replicas=15)),
        ("num_replicas", dict(num_replicas=8)),
        ("num_ranks", dict(num_ranks=0)),
        ("num_groups", dict(num_groups=5)),
        ("num_groups", dict(num_groups=4, num_nodes=8, num_ranks=8)),
        ("num_nodes", dict(num_nodes=3)),
        ("max_moves", dict(max_moves=1)),
        ("previous", dict(previous=3)),
        ("load", dict(load=np.full((1, 12), np.nan))),
        ("load", dict(load=-np.ones((1, 12)))),
        ("load", dict(load=np.ones(12))),
    ],
)
def test_errors_name_the_argument(name, changes):
    arguments = dict(load=np.ones((1, 12)), num_replicas=16, num_ranks=4) | changes
    with pytest.raises(moecomm.InvalidArgument, match=f"{name} is"):
        rebalance(arguments.pop("load"), **arguments)


@pytest.mark.parametrize("table", [[[0, 1, 2, 2]], [[0, 0, 1, 2]], [[0, 1, 2, 3]], [[0, 1, -1, 2]]])
def test_impossible_placements(table):
    with pytest.raises(moecomm.InvalidArgument, match="physical_to_logical"):
        Placement(torch.tensor(table), 3, 2)
