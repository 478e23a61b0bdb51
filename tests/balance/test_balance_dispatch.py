"""Dispatch by logical ids: every pick reaches one slot of its expert, and all results equal the oracle's."""

import numpy as np
import pytest
import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture
from placed_worlds import EXPERTS, TOP_K, load_of, physical_ids, placed, run, skewed_world

import moecomm
from moecomm.balance import LoadMonitor, Placement, rebalance
from moecomm.balance.replicas import MODES

pytestmark = pytest.mark.usefixtures("either_world")


def best_split(load, placement):
    """Minimum load of the heaviest rank for fractional tokens, by a linear program."""
    from scipy.optimize import linprog

    slots, ranks = placement.num_slots, placement.num_ranks
    expert = placement.physical_to_logical[0].numpy()
    per_rank = np.zeros((ranks, slots + 1))
    per_rank[np.arange(slots) // placement.slots_per_rank, np.arange(slots)] = 1
    per_rank[:, -1] = -1
    per_expert = np.zeros((len(load), slots + 1))
    per_expert[expert, np.arange(slots)] = 1
    return linprog(np.eye(slots + 1)[-1], per_rank, np.zeros(ranks), per_expert, load).fun


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nodes,per_node", [(1, 1), (1, 4), (2, 2), (3, 1)])
def test_modes_against_the_oracle(mode, nodes, per_node):
    size = nodes * per_node
    world = skewed_world(size, [17 + 9 * r % 23 for r in range(size)], seed=size)
    run(world, placed(world[1], size, nodes), mode, nodes)


def test_ranks_without_tokens():
    world = skewed_world(4, [9, 0, 0, 3], seed=5)
    for mode in MODES:
        run(world, placed(world[1], 4, 2), mode, 2)


@pytest.mark.parametrize("seed", range(3))
def test_optimal_is_the_linear_program_and_whole_tokens(seed):
    size = 4
    world = skewed_world(size, 64, seed=seed)
    stale = placed(skewed_world(size, 64, seed=seed + 50)[1], size, connected=True)
    rows = run(world, stale, "optimal")[1]
    bound = best_split(load_of(world[1])[0].numpy(), stale)
    assert bound - 1e-6 <= rows.max() <= bound * 1.01 + stale.slots_per_rank, (
        "rounding costs at most one token per replica"
    )
    assert rows.max() <= run(world, stale, "even")[1].max()


def test_even_splits_every_source_evenly():
    size = 4
    world = skewed_world(size, 40)
    p = placed(world[1], size)
    sent, _ = run(world, p, "even")
    for s in range(size):
        for e in range(EXPERTS):
            slots = p.logical_to_physical[0, e, : int(p.replica_count[0, e])]
            got = [int((sent[s] == q).sum()) for q in slots]
            assert max(got) - min(got) <= 1, (s, e, got)


def test_local_visits_few_nodes():
    """Between the minimum number of nodes and that of a greedy cover, and better than an even split."""
    size, nodes = 6, 3
    world = skewed_world(size, 50, seed=2)
    p = placed(world[1], size, nodes, per_rank=5)
    visited = {}
    for mode in ("local", "even"):
        sent, _ = run(world, p, mode, nodes)
        visited[mode] = sum(
            len(set((t[t >= 0] // (2 * 5)).tolist()) - {s // 2}) for s in range(size) for t in sent[s]
        )
    assert visited["local"] < visited["even"]
    sent, _ = run(world, p, "local", nodes)
    for s in range(size):
        for t, picks in zip(sent[s], world[1][s]):
            hosts = [
                {int(q) // 10 for q in p.logical_to_physical[0, e] if q >= 0}
                for e in picks.tolist()
                if e >= 0
            ]
            if hosts and set.intersection(*hosts, {s // 2}):
                assert set((t[t >= 0] // 10).tolist()) == {s // 2}, "all picks live in the source's node"


@pytest.mark.parametrize("mode", MODES)
def test_activate_limits_what_runs_on_a_rank(mode):
    size, limit = 4, 4
    world = skewed_world(size, 60, seed=3)
    p = placed(world[1], size, per_rank=7, connected=True)
    sent, _ = run(world, p, mode, activate=limit)
    running = {int(q) for s in sent for q in s[s >= 0]}
    per_rank = [sum(q // 7 == r for q in running) for r in range(size)]
    assert max(per_rank) <= limit


def test_activate_refuses_what_cannot_run():
    table = torch.tensor([[0, 1, 2, 0, 3, 1]])  # only rank 0 has expert 2
    Placement(table, 4, 2)

    def rank_main(comm):
        with pytest.raises(moecomm.InvalidArgument, match="activate is 1"):
            moecomm.Buffer(
                comm,
                hidden=32,
                num_experts=4,
                top_k=2,
                max_tokens=4,
                placement=Placement(table, 4, 2),
                activate=1,
            )

    moecomm.run_local(rank_main, 2)


def test_gradients_follow():
    size, hidden = 4, 16
    xs, ids, weights = skewed_world(size, 12, seed=9, hidden=hidden)
    p = placed(ids, size)
    scale = torch.rand(EXPERTS) + 0.5  # expert e multiplies by scale[e]

    def rank_main(comm):
        r = comm.rank
        x, w = xs[r].float().requires_grad_(), weights[r].clone().requires_grad_()
        buf = moecomm.Buffer(
            comm,
            hidden=hidden,
            num_experts=EXPERTS,
            top_k=TOP_K,
            max_tokens=12,
            dtype=torch.float32,
            placement=p,
        )
        out = buf.dispatch(x, ids[r], w)
        local = p.physical_to_logical[0, r * p.slots_per_rank : (r + 1) * p.slots_per_rank]
        y = buf.combine(
            out.x * scale[torch.repeat_interleave(local, out.tokens_per_expert)][:, None],
            out.handle,
            topk_weights=out.topk_weights,
        )
        (y * y.detach().cos()).sum().backward()
        comm.barrier()
        return x, w, y.detach()

    for r, (x, w, y) in enumerate(moecomm.run_local(rank_main, size, ranks_per_node=2)):
        x2, w2 = (t.detach().clone().requires_grad_() for t in (x, w))
        factor = (w2 * torch.where(ids[r] >= 0, scale[ids[r].clamp_min(0)], 0.0)).sum(1, keepdim=True)
        dense = x2 * factor
        torch.testing.assert_close(y, dense.detach(), rtol=1e-5, atol=1e-5)
        (dense * y.cos()).sum().backward()
        torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(w.grad, w2.grad, rtol=1e-4, atol=1e-4)


def test_a_shared_expert_is_one_more_expert():
    """Every token picks it, and all ranks have replicas, so all ranks get an equal share."""
    size = 4
    xs, ids, weights = skewed_world(size, 32)
    ids = [torch.cat([i[:, :3], torch.full((len(i), 1), EXPERTS)], 1) for i in ids]
    p = placed(ids, size, per_rank=5, experts=EXPERTS + 1)
    assert p.replica_count[0, EXPERTS] >= 3
    _sent, rows = run((xs, ids, weights), p, "optimal")
    assert rows.max() - rows.min() <= 5


def test_decode_takes_logical_ids():
    size = 4
    xs, ids, weights = skewed_world(size, 6, seed=1)
    p = placed(ids, size)

    def rank_main(comm):
        r = comm.rank
        buf = moecomm.Buffer(
            comm,
            hidden=32,
            num_experts=EXPERTS,
            top_k=TOP_K,
            max_tokens=6,
            placement=p,
            replicas="even",
            decode=True,
        )
        ys = []
        for _ in range(3):
            recv, hook = buf.decode_dispatch(xs[r], ids[r], quant=None)
            hook()
            recv.handle.rows.copy_(recv.x)
            y, hook = buf.decode_combine(recv.handle.rows, ids[r], weights[r], recv.handle)
            hook()
            ys.append(y.clone())
        comm.barrier()
        return ys

    for r, ys in enumerate(moecomm.run_local(rank_main, size)):
        dense = xs[r].float() * (weights[r] * (ids[r] >= 0)).sum(1, keepdim=True)
        for y in ys:
            torch.testing.assert_close(y.float(), dense, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("travel", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_decode_leaves_out_experts_without_a_slot(mode, travel, renormalize):
    """Experts 2 and 7 have no slot."""
    size, gone = 4, (2, 7)
    xs, ids, weights = skewed_world(size, 6, seed=13)
    table = torch.tensor([[e for e in range(EXPERTS) if e not in gone] + [0, 1]])
    p = moecomm.balance.Placement(table, EXPERTS, size, 2, partial=True)

    def rank_main(comm):
        r = comm.rank
        buf = moecomm.Buffer(
            comm,
            hidden=32,
            num_experts=EXPERTS,
            top_k=TOP_K,
            max_tokens=6,
            placement=p,
            replicas=mode,
            renormalize=renormalize,
            dtype=torch.float32,
        )
        x, results = xs[r].float(), []
        for _ in range(3):
            recv, hook = buf.decode_dispatch(
                x, ids[r], topk_weights=weights[r] if travel else None, quant=None
            )
            hook()
            recv.handle.rows.copy_(recv.x)
            y, hook = buf.decode_combine(
                recv.handle.rows, ids[r], None if travel else weights[r], recv.handle
            )
            hook()
            results.append((y.clone(), buf.decode_lost_weight(ids[r], weights[r])))
        counted = buf.decode_lost_weight(ids[r])
        out = buf.dispatch(x, ids[r], weights[r])
        comm.barrier()
        return results, counted, out.lost_weight.clone()

    for r, (results, counted, by_dispatch) in enumerate(moecomm.run_local(rank_main, size, ranks_per_node=2)):
        lost = (ids[r] == gone[0]) | (ids[r] == gone[1])
        assert lost.any()
        kept = (weights[r] * (~lost & (ids[r] >= 0))).sum(1)
        total = (weights[r] * (ids[r] >= 0)).sum(1)
        factor = torch.where(kept > 0, total, 0.0) if renormalize else kept
        for y, weight in results:
            torch.testing.assert_close(weight, (weights[r] * lost).sum(1))
            torch.testing.assert_close(y, xs[r].float() * factor[:, None], rtol=1e-5, atol=1e-5)
        assert counted.tolist() == lost.sum(1).tolist()
        torch.testing.assert_close(by_dispatch, results[0][1])


def test_asynchronous_calls_keep_their_order():
    size = 4
    world = skewed_world(size, 20)
    xs, ids, weights = world
    p = placed(ids, size)

    def rank_main(comm):
        r = comm.rank
        buf = moecomm.Buffer(comm, hidden=32, num_experts=EXPERTS, top_k=TOP_K, max_tokens=20, placement=p)
        pending = [buf.dispatch(xs[r], ids[r], weights[r], async_op=True) for _ in range(4)]
        outs = [q.wait() for q in pending]
        assert len({int(o.tokens_per_expert.sum()) for o in outs}) <= 4
        total = sum(int(o.tokens_per_expert.sum()) for o in outs)
        comm.barrier()
        return total

    assert sum(moecomm.run_local(rank_main, size)) == 4 * int(load_of(ids).sum())


def test_a_batch_never_mixes_placements():
    size = 4
    xs, ids, _weights = skewed_world(size, 16)
    old = placed(ids, size)
    new = rebalance(torch.rand(1, EXPERTS) + 0.1, num_replicas=old.num_slots, num_ranks=size, previous=old)

    def rank_main(comm):
        buf = moecomm.Buffer(comm, hidden=32, num_experts=EXPERTS, top_k=TOP_K, max_tokens=16, placement=old)
        with pytest.raises(moecomm.ConfigMismatch, match="placement"):
            buf.use(new if comm.rank == 2 else old)
        before = buf.dispatch(xs[comm.rank], ids[comm.rank])
        buf.use(new)
        after = buf.dispatch(xs[comm.rank], ids[comm.rank])
        comm.barrier()
        return [(o.source_rank, o.source_token, o.tokens_per_expert) for o in (before, after)]

    outs = moecomm.run_local(rank_main, size)
    physical_ids([o[0] for o in outs], old, ids)
    physical_ids([o[1] for o in outs], new, ids)


@pytest.mark.parametrize(
    "bad,what",
    [
        ([0, 0], "picked twice in token 1"),
        ([3, EXPERTS], "out of range in token 1"),
        ([-2, 1], "out of range"),
    ],
)
def test_bad_ids_are_refused_before_anything_moves(bad, what):
    def rank_main(comm):
        buf = moecomm.Buffer(
            comm,
            hidden=32,
            num_experts=EXPERTS,
            top_k=2,
            max_tokens=4,
            placement=placed([torch.arange(EXPERTS)], 1),
        )
        x = torch.zeros(2, 32).bfloat16()
        with pytest.raises(moecomm.InvalidArgument, match=what):
            buf.dispatch(x, torch.tensor([[1, 2], bad]))
        with pytest.raises(moecomm.InvalidArgument, match="layer is 1"):
            buf.dispatch(x, torch.tensor([[1, 2], [3, 4]]), layer=1)
        assert len(buf.dispatch(x, torch.tensor([[1, 2], [3, 4]])).x) == 4

    moecomm.run_local(rank_main, 1)


# -- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["even", "optimal"])
def test_monitor_counts_what_was_dispatched(mode):
    size, batches = 2, 5
    worlds = [skewed_world(size, 30, seed=s) for s in range(batches)]
    p = placed(worlds[0][1], size)

    def rank_main(comm):
        monitor = LoadMonitor(1, EXPERTS, window=3, half_life=2.0)
        buf = moecomm.Buffer(
            comm,
            hidden=32,
            num_experts=EXPERTS,
            top_k=TOP_K,
            max_tokens=30,
            placement=p,
            replicas=mode,
            monitor=monitor,
        )
        for xs, ids, _ in worlds:
            buf.dispatch(xs[comm.rank], ids[comm.rank])
        loads = monitor.load(comm, weighted=False), monitor.load(comm)
        advice = monitor.advise(
            p, seconds_per_row=1e-3, bytes_per_expert=1e6, bytes_per_second=1e9, batches=1000, comm=comm
        )
        comm.barrier()
        return *loads, advice

    every = [load_of(ids) for _, ids, _ in worlds]
    for window, average, advice in moecomm.run_local(rank_main, size):
        assert torch.equal(window, sum(every[2:]))
        torch.testing.assert_close(
            average, sum(load * 0.5 ** ((batches - 1 - i) / 2) for i, load in enumerate(every))
        )
        assert advice.placement.version == 1 and advice.after >= advice.before - 1e-9
        assert advice.pays == (advice.gain > advice.cost)


def test_advice_weighs_gain_against_bytes():
    p = rebalance(np.ones((1, 8)), num_replicas=12, num_ranks=4)
    monitor = LoadMonitor(1, 8)
    for _ in range(3):
        monitor.record(0, np.array([800, 10, 10, 10, 10, 10, 10, 10]))
    ask = dict(seconds_per_row=1e-6, bytes_per_expert=1e8, bytes_per_second=1e9)
    soon, late = monitor.advise(p, batches=1, **ask), monitor.advise(p, batches=10**6, **ask)
    assert not soon.pays and late.pays and late.after > late.before
    saved = (
        float((p.rank_load(monitor.load()) - 0).max() - late.placement.rank_load(monitor.load()).max()) / 3
    )
    assert late.gain == pytest.approx(saved * 1e-6 * 10**6, rel=0.05)
    monitor.reset()
    assert monitor.load().sum() == 0


def test_a_copy_of_a_monitor_keeps_its_counts():
    monitor, draw = LoadMonitor(2, 8, window=2), np.random.default_rng()
    first, second = draw.integers(0, 100, (2, 8)), draw.integers(1, 100, (2, 8))
    for layer in range(2):
        monitor.record(layer, first[layer], everywhere=True)
    taken = monitor.copy()
    for layer in range(2):
        monitor.record(layer, second[layer], everywhere=True)
    assert np.array_equal(taken.load(weighted=False).numpy(), first) and taken.batches.tolist() == [1, 1]
    taken.record(0, second[0], everywhere=True)
    assert monitor.batches.tolist() == [2, 2]
