"""Choices within a batch, as functions: splits compared with linear programs, and the active replicas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from bench.balance_baseline import best_split
from moecomm._native.balance import Replicas
from moecomm.balance import rebalance


def hosted(load, ranks, per_rank, **options):
    """Return the native index of a placement for this load [E]."""
    table = (
        rebalance(load[None], num_replicas=ranks * per_rank, num_ranks=ranks, **options)
        .physical_to_logical[0]
        .numpy()
    )
    return Replicas(table.astype(np.int32), len(load), ranks, 1)


def loads(experts, sigma, seed):
    """Return two loads [E]: one, and the same after some drift."""
    g = np.random.default_rng(seed)
    load = g.lognormal(0, sigma, experts)
    return load, load * g.lognormal(0, 0.3, experts)


def rank_load(replicas, share):
    """Load of every rank."""
    return np.bincount(replicas.rank, share, replicas.ranks)


# -- splits -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 8),
    per_rank=st.integers(1, 6),
    sigma=st.sampled_from([0.0, 1.0, 2.0]),
    seed=st.integers(0, 999),
    connected=st.booleans(),
    some=st.booleans(),
)
def test_split_is_the_linear_program(ranks, per_rank, sigma, seed, connected, some):
    g = np.random.default_rng(seed)
    experts = int(g.integers(max(1, per_rank), ranks * per_rank + 1))
    load, later = loads(experts, sigma, seed)
    later[g.random(experts) < 0.1] = 0.0
    r = hosted(load, ranks, per_rank, connected=connected)
    active = (g.random(r.count) < (0.7 if some else 1.0)).astype(np.uint8)
    active[np.array(r.first[:-1])] = 1  # every expert is active
    share = np.full(r.count, np.nan)
    most = r.split(later, share, active if some else None, rounds=400)
    assert (share >= 0).all() and (share[active == 0] == 0).all()
    np.testing.assert_allclose(np.add.reduceat(share, r.first[:-1]), later, rtol=1e-9, atol=1e-12)
    assert most == pytest.approx(rank_load(r, share).max())
    mean = later.sum() / ranks
    bound = best_split(later, r, active)
    assert bound - 1e-9 * mean - 1e-12 <= most <= bound + 0.005 * mean + 1e-12


def test_load_passes_along_a_chain_within_the_usual_rounds():
    """Each rank shares an expert with the next, and the surplus of the first half must reach the second half."""
    ranks = 16
    table = np.array(
        [e for r in range(ranks) for e in (r, 15 + r if r else 31, 16 + r if r < 15 else 32)], dtype=np.int32
    )
    load = np.ones(33)
    load[:8], load[16:31], load[31:] = 1.9, 8.0, 0.0
    r, share = Replicas(table, 33, ranks, 1), np.empty(len(table))
    assert best_split(load, r) == pytest.approx(load.sum() / ranks)
    assert load.sum() / ranks / r.split(load, share) > 0.999
    assert load.sum() / ranks / r.split(load, share, None, 400) > 0.9999


def test_a_placement_from_a_sample_splits_evenly():
    """The placement is computed from 1/8 of the batch: the split corrects its errors."""
    g = np.random.default_rng(0)
    chance = g.lognormal(0, 1, 256)
    chance /= chance.sum()
    counts, sample = (g.multinomial(n, chance).astype(float) for n in (1 << 20, 1 << 17))
    r = hosted(sample, 32, 9, connected=True)
    assert counts.sum() / 32 / r.split(counts, np.empty(288)) > 0.997


# -- which replicas run -------------------------------------------------------------------------------


def room_for_all(replicas, load, limit):
    """Tell by a maximum flow whether all experts with load fit while no rank runs more than `limit` experts."""
    experts, ranks = len(load), replicas.ranks
    source, sink = experts + ranks, experts + ranks + 1
    wanted = [e for e in range(experts) if load[e] > 0]
    of = np.repeat(np.arange(experts), np.diff(replicas.first))
    rows = [source] * len(wanted) + of.tolist() + [experts + r for r in range(ranks)]
    columns = wanted + [experts + r for r in replicas.rank] + [sink] * ranks
    capacity = [1] * (len(wanted) + replicas.count) + [limit] * ranks
    graph = csr_matrix((np.array(capacity, dtype=np.int32), (rows, columns)), shape=(sink + 1, sink + 1))
    return maximum_flow(graph, source, sink).flow_value == len(wanted)


@settings(max_examples=80, deadline=None)
@given(
    ranks=st.integers(1, 8),
    per_rank=st.integers(1, 6),
    limit=st.integers(1, 6),
    sigma=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 999),
    zeros=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_what_runs_is_within_the_limit_and_serves_every_expert(ranks, per_rank, limit, sigma, seed, zeros):
    g = np.random.default_rng(seed)
    experts = int(g.integers(max(1, per_rank), ranks * per_rank + 1))
    load, later = loads(experts, sigma, seed)
    later[g.random(experts) < zeros] = 0.0
    r = hosted(load, ranks, per_rank)
    limit = min(limit, per_rank)
    active = np.full(r.count, 7, dtype=np.uint8)
    stuck = r.activate(later, limit, active)
    assert (stuck < 0) == room_for_all(r, later, limit)
    if stuck >= 0:
        assert later[stuck] > 0
        return
    assert set(active.tolist()) <= {0, 1}
    assert np.bincount(r.rank, active, ranks).max() <= limit
    runs = np.add.reduceat(active, r.first[:-1])
    assert (runs[later > 0] >= 1).all()
    again = np.empty_like(active)
    r.activate(later, limit, again)
    assert (again == active).all(), "a pure function"


@pytest.mark.parametrize("ranks,per_rank,experts", [(32, 16, 256), (8, 6, 30), (12, 6, 40)])
def test_few_replicas_do_as_well_as_all(ranks, per_rank, experts):
    """If all replicas may be active, those of a forest balance as well as all of them."""
    load, later = loads(experts, 0.7, ranks)
    r = hosted(load, ranks, per_rank)
    active = np.empty(r.count, dtype=np.uint8)
    assert r.activate(later, per_rank, active) < 0
    assert active.sum() < experts + ranks
    assert best_split(later, r, active) == pytest.approx(best_split(later, r), rel=1e-3)


def test_nine_of_sixteen_run_and_balance_all_the_same():
    got = []
    for seed in range(6):
        load, later = loads(256, 1.0, seed)
        r = hosted(load, 32, 16, connected=True)
        active = np.empty(r.count, dtype=np.uint8)
        assert r.activate(later, 9, active) < 0
        got.append(later.sum() / 32 / r.split(later, np.empty(r.count), active))
    assert min(got) > 0.95 and np.mean(got) > 0.98


def test_what_runs_balances_perfectly_where_a_forest_fits():
    """Five experts on two ranks with at most three active each: six replicas, the number of edges in a forest."""
    table = np.array([0, 1, 2, 4, 0, 1, 3, 4], dtype=np.int32)
    r, active, share = Replicas(table, 5, 2, 1), np.empty(8, dtype=np.uint8), np.empty(8)
    load = np.array([5.0, 3.0, 1.0, 2.0, 1.0])
    assert r.activate(load, 3, active) < 0 and active.sum() == 6
    assert r.split(load, share, active) == pytest.approx(6.0)
