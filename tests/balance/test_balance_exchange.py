"""The choice of replicas by the counts of all ranks, without an extra exchange, and its failures."""

import pytest
import torch
from placed_worlds import EXPERTS, TOP_K, load_of, physical_ids, placed, run, skewed_world
from worlds import assert_same

import moecomm
from moecomm.balance.replicas import MODES

SIZE, TOKENS = 4, 24
OTHER = {"replicas": "even", "activate": 4}


def buffer(comm, placement, mode, **options):
    """Make a Buffer for these worlds."""
    return moecomm.Buffer(
        comm,
        hidden=32,
        num_experts=EXPERTS,
        top_k=TOP_K,
        max_tokens=TOKENS,
        placement=placement,
        replicas=mode,
        **options,
    )


def on_ranks(fn, world, placement, mode, nodes=2, **options):
    """Run fn(buf, x, ids, weights) on all ranks; return their results."""

    def rank_main(comm):
        buf = buffer(comm, placement, mode, **options)
        result = fn(buf, *(t[comm.rank] for t in world))
        comm.barrier()
        return result

    return moecomm.run_local(rank_main, SIZE, ranks_per_node=SIZE // nodes)


def exchanges(buf, call):
    """Number of count rounds of a call."""
    buf.stats()
    call()
    return buf.stats()["exchanges"]


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_optimal_exchanges_as_often_as_local(nodes):
    """One round, in the dispatch; a repeated plan and a static capacity need no more."""
    world = skewed_world(SIZE, TOKENS, seed=nodes)
    p = placed(world[1], SIZE, nodes, per_rank=6)

    def count(buf, x, ids, weights):
        out = buf.dispatch(x, ids, weights)
        return [
            exchanges(buf, lambda: buf.dispatch(x, ids, weights)),
            exchanges(buf, lambda: buf.dispatch(x, ids, weights, capacity=400, expert_alignment=4)),
            exchanges(buf, lambda: buf.dispatch(x, handle=out.handle)),
            exchanges(buf, lambda: buf.combine(out.x, out.handle)),
        ]

    counted = {
        (mode, activate): on_ranks(count, world, p, mode, nodes, activate=activate)
        for mode in MODES
        for activate in (None, 5)
    }
    assert counted["local", None] == [[1, 1, 1, 0]] * SIZE
    for (mode, activate), got in counted.items():
        # Only a choice token by token is unknown to other ranks.
        assert got == ([[2, 2, 1, 0]] * SIZE if mode == "local" and activate else counted["local", None]), (
            mode,
            activate,
        )


@pytest.mark.parametrize("mode,rounds", [("local", 1), ("even", 1), ("optimal", 2)])
def test_the_rank_layout_tells_its_rows_in_a_second_round(mode, rounds):
    """One row per (token, rank): their number does not follow from the picks per expert."""
    world = skewed_world(SIZE, TOKENS, seed=3)
    p = placed(world[1], SIZE, 2)

    def both(buf, x, ids, weights):
        got = []
        for layout in ("rank", "expert"):
            out = buf.dispatch(x, ids, weights, layout=layout)
            rows = out.x.float() * (1 if layout == "expert" else out.topk_weights.sum(1, keepdim=True))
            got.append(
                buf.combine(
                    rows.bfloat16(), out.handle, topk_weights=out.topk_weights if layout == "expert" else None
                ).clone()
            )
        return exchanges(buf, lambda: buf.dispatch(x, ids, weights, layout="rank")), *got

    for r, (counted, by_rank, by_expert) in enumerate(on_ranks(both, world, p, mode)):
        assert counted == rounds
        torch.testing.assert_close(by_rank.float(), by_expert.float(), rtol=0.03, atol=0.03)
        dense = world[0][r].float() * (world[2][r] * (world[1][r] >= 0)).sum(1, keepdim=True)
        torch.testing.assert_close(by_rank.float(), dense, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activate", [None, 4])
def test_decode_chooses_in_a_round_of_its_own_where_it_must(mode, activate):
    """Decode announces no counts, so its choice needs an extra round."""
    world = skewed_world(SIZE, 6, seed=1)
    p = placed(world[1], SIZE, 2, per_rank=6)

    def steps(buf, x, ids, weights):
        counted, ys = [], []
        for step in range(4):

            def decode(step=step):
                recv, hook = buf.decode_dispatch(x, ids, quant=None)
                hook()
                recv.handle.rows.copy_(recv.x)
                ys.append(
                    buf.decode_combine(recv.handle.rows, ids, weights, recv.handle, return_hook=False)[
                        0
                    ].clone()
                )
                if step % 2:  # both kinds of call
                    buf.dispatch(x, ids)

            counted.append(exchanges(buf, decode))
        return counted, ys

    extra = 1 if mode == "optimal" or activate else 0
    normal = 2 if mode == "local" and activate else 1
    for r, (counted, ys) in enumerate(on_ranks(steps, world, p, mode, activate=activate)):
        assert counted == [extra, extra + normal] * 2
        dense = world[0][r].float() * (world[2][r] * (world[1][r] >= 0)).sum(1, keepdim=True)
        for y in ys:
            torch.testing.assert_close(y.float(), dense, rtol=0.02, atol=0.02)


def test_decode_by_all_counts_balances_the_step():
    """The slots of a decode step are the optimal split of its picks."""
    world = skewed_world(SIZE, TOKENS, seed=11)
    p = placed(skewed_world(SIZE, TOKENS, seed=12)[1], SIZE, connected=True)

    def rows(buf, x, ids, weights):
        recv, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
        return int(recv.counts.sum())

    _, wanted = run(world, p, "optimal")
    got = on_ranks(rows, world, p, "optimal", nodes=1)
    assert sum(got) == int(load_of(world[1]).sum())
    assert max(got) <= wanted.max() + p.slots_per_rank, "two turns of the same split: rounding alone"


@pytest.mark.parametrize("mode", MODES)
def test_the_same_calls_choose_the_same(mode):
    world = skewed_world(SIZE, TOKENS, seed=7)
    p = placed(world[1], SIZE, 2, per_rank=6, connected=True)

    def three(buf, x, ids, weights):
        outs = [buf.dispatch(x, ids, weights) for _ in range(3)]
        return [(o.source_rank.clone(), o.source_token.clone(), o.tokens_per_expert.clone()) for o in outs]

    first, again = (on_ranks(three, world, p, mode) for _ in range(2))
    for a, b in zip(first, again):
        for x, y in zip(a, b):
            assert all(torch.equal(s, t) for s, t in zip(x, y))
    for step in range(3):
        physical_ids([r[step] for r in first], p, world[1])  # whole batches, for any state of the rotation


@pytest.mark.parametrize("mode", ["local", "optimal"])
@pytest.mark.parametrize("what", ["layer", "layout", "handle", "capacity"])
def test_calls_that_differ_are_refused_everywhere_and_the_buffer_stays_usable(mode, what):
    world = skewed_world(SIZE, TOKENS, seed=2)
    one = placed(world[1], SIZE, 2)
    table = torch.cat([one.physical_to_logical, one.physical_to_logical.flip(1)])  # a second layer
    p = moecomm.balance.Placement(table, EXPERTS, SIZE, 2)

    def differ(buf, x, ids, weights):
        other = buf.comm.rank == 2
        handle = buf.dispatch(x, ids, weights).handle
        for _ in range(3):
            with pytest.raises(moecomm.ConfigMismatch):
                if what == "handle" and other:
                    buf.dispatch(x, handle=handle)
                else:
                    different = {
                        "layer": dict(layer=1),
                        "layout": dict(layout="rank"),
                        "capacity": dict(capacity=300),
                        "handle": {},
                    }[what]
                    buf.dispatch(x, ids, weights, **(different if other else {}))
        out = buf.dispatch(x, ids, weights, layer=1)
        y = buf.combine(out.x, out.handle, topk_weights=out.topk_weights).clone()
        buf.dispatch(x, handle=handle)
        return y

    for r, y in enumerate(on_ranks(differ, world, p, mode)):
        dense = world[0][r].float() * (world[2][r] * (world[1][r] >= 0)).sum(1, keepdim=True)
        torch.testing.assert_close(y.float(), dense, rtol=0.02, atol=0.02)


def test_too_little_capacity_is_refused_everywhere_and_the_buffer_stays_usable():
    world = skewed_world(SIZE, TOKENS, seed=2)

    def tight(buf, x, ids, weights):
        with pytest.raises(moecomm.CapacityExceeded):
            buf.dispatch(x, ids, weights, capacity=3)
        return len(buf.dispatch(x, ids, weights).x)

    assert sum(on_ranks(tight, world, placed(world[1], SIZE, 2), "optimal")) == int(load_of(world[1]).sum())


@pytest.mark.parametrize("what", ["replicas", "activate"])
def test_ranks_must_choose_by_the_same_rules(what):
    world = skewed_world(SIZE, TOKENS)
    p = placed(world[1], SIZE, per_rank=6)

    def rank_main(comm):
        options = dict(replicas="optimal", activate=None) | ({what: OTHER[what]} if comm.rank == 1 else {})
        with pytest.raises(moecomm.ConfigMismatch, match=what):
            moecomm.Buffer(
                comm, hidden=32, num_experts=EXPERTS, top_k=TOP_K, max_tokens=TOKENS, placement=p, **options
            )

    moecomm.run_local(rank_main, SIZE)


def test_one_ranks_bad_ids_can_be_given_again():
    """All ranks get the error in that call, no data moves, and the rotation of replicas stays equal on all ranks."""
    world = skewed_world(SIZE, TOKENS, seed=4)

    def twice(buf, x, ids, weights):
        ys = []
        for step in range(4):
            wrong = ids.clone()
            wrong[3, 1] = EXPERTS
            alone = buf.comm.rank == step
            with pytest.raises(
                moecomm.InvalidArgument,
                match="out of range in token 3" if alone else f"rank {step} refused its part",
            ):
                buf.dispatch(x, wrong if alone else ids, weights)
            out = buf.dispatch(x, ids, weights)
            ys.append(buf.combine(out.x, out.handle, topk_weights=out.topk_weights).clone())
        return ys

    for r, ys in enumerate(on_ranks(twice, world, placed(world[1], SIZE, 2), "optimal")):
        dense = world[0][r].float() * (world[2][r] * (world[1][r] >= 0)).sum(1, keepdim=True)
        for y in ys:
            torch.testing.assert_close(y.float(), dense, rtol=0.02, atol=0.02)


def test_every_row_is_verified_against_counts_that_were_derived(monkeypatch):
    """With MOECOMM_CHECK=1, received rows are compared with the counts that the choice implies."""
    monkeypatch.setenv("MOECOMM_CHECK", "1")
    world = skewed_world(SIZE, TOKENS, seed=6)
    for mode in MODES:
        run(world, placed(world[1], SIZE, 2), mode, 2)


def test_gradients_reach_through_few_active_replicas():
    """activate=n gives the same gradients as no choice."""
    world = skewed_world(SIZE, 12, seed=9)
    p = placed(world[1], SIZE, 2, per_rank=7, connected=True)

    def backward(buf, x, ids, weights):
        x, w = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = buf.dispatch(x, ids, w)
        active = int((out.tokens_per_expert > 0).sum())
        y = buf.combine(out.x * 2, out.handle, topk_weights=out.topk_weights)
        y.float().square().sum().backward()
        return active, x, w, y.detach()

    for mode in MODES:
        for r, (active, x, w, y) in enumerate(on_ranks(backward, world, p, mode, activate=4)):
            assert active <= 4
            x2, w2 = (t.detach().float().requires_grad_() for t in (x, w))
            dense = x2 * 2 * (w2 * (world[1][r] >= 0)).sum(1, keepdim=True)
            torch.testing.assert_close(y.float(), dense.detach(), rtol=0.02, atol=0.02)
            (dense * y.float() * 2).sum().backward()
            torch.testing.assert_close(x.grad.float(), x2.grad, rtol=0.03, atol=0.03)
            torch.testing.assert_close(w.grad, w2.grad, rtol=0.03, atol=0.5)


def test_a_plan_is_repeated_without_another_choice():
    world = skewed_world(SIZE, TOKENS, seed=8)

    def repeat(buf, x, ids, weights):
        first = buf.dispatch(x, ids, weights)
        kept = first.x.clone()
        buf.dispatch(x, ids, weights)  # another state of the rotation
        return kept, buf.dispatch(x, handle=first.handle).x.clone()

    for r, (first, again) in enumerate(on_ranks(repeat, world, placed(world[1], SIZE, 2), "optimal")):
        assert_same(again, first, f"rank {r}")


def test_what_was_submitted_goes_by_the_placement_of_its_time():
    world = skewed_world(SIZE, TOKENS, seed=5)
    old = placed(world[1], SIZE, 2)
    new = moecomm.balance.rebalance(
        torch.rand(1, EXPERTS) + 0.1, num_replicas=old.num_slots, num_nodes=2, num_ranks=SIZE, previous=old
    )

    def change(buf, x, ids, weights):
        pending = [buf.dispatch(x, ids, weights, async_op=True) for _ in range(3)]
        buf.use(new)
        outs = [*(p.wait() for p in pending), buf.dispatch(x, ids, weights)]
        return [(o.source_rank.clone(), o.source_token.clone(), o.tokens_per_expert.clone()) for o in outs]

    for mode in MODES:
        outs = on_ranks(change, world, old, mode)
        for step, placement in enumerate((old, old, old, new)):
            physical_ids([r[step] for r in outs], placement, world[1])


def test_gradients_follow_the_weights_that_are_left():
    """Experts 2 and 7 have no replica; other weights are scaled up, and gradients include the scale."""
    xs, ids, weights = skewed_world(SIZE, TOKENS, seed=13)
    table = torch.tensor([[e for e in range(EXPERTS) if e not in (2, 7)] + [0, 1]])
    p = moecomm.balance.Placement(table, EXPERTS, SIZE, 2, partial=True)
    scale = torch.rand(EXPERTS) + 0.5

    def backward(buf, x, ids, weights):
        x, w = x.float().requires_grad_(), weights.clone().requires_grad_()
        out = buf.dispatch(x, ids, w)
        local = table[0, buf.comm.rank * 3 : (buf.comm.rank + 1) * 3].repeat_interleave(out.tokens_per_expert)
        y = buf.combine(out.x * scale[local][:, None], out.handle, topk_weights=out.topk_weights)
        (y * y.detach().cos()).sum().backward()
        return x, w, y.detach(), out.lost_weight

    for mode in MODES:
        for r, (x, w, y, lost) in enumerate(
            on_ranks(backward, (xs, ids, weights), p, mode, renormalize=True, dtype=torch.float32)
        ):
            x2, w2 = (t.detach().clone().requires_grad_() for t in (x, w))
            gone = (ids[r] == 2) | (ids[r] == 7)
            here = ~gone & (ids[r] >= 0)
            assert (gone.any(1) & here.any(1)).any()
            torch.testing.assert_close(lost, (w2 * gone).sum(1).detach())
            assert not lost.requires_grad
            kept = (w2 * here).sum(1)
            factor = torch.where(kept > 0, (w2 * (ids[r] >= 0)).sum(1) / kept.clamp_min(1e-30), 0.0)
            dense = x2 * (factor * (w2 * scale[ids[r].clamp_min(0)] * here).sum(1))[:, None]
            torch.testing.assert_close(y, dense.detach(), rtol=1e-4, atol=1e-4)
            (dense * y.cos()).sum().backward()
            torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(w.grad, w2.grad, rtol=1e-3, atol=1e-3)


def test_the_choice_is_part_of_a_compiled_graph():
    """One graph without a break: the operator makes the choice."""
    xs, ids, weights = skewed_world(2, TOKENS, seed=14)

    def compiled(comm):
        buf = buffer(comm, placed(ids, 2), "optimal")

        def layer(x, ids, weights):
            out = buf.dispatch(x, ids, weights)
            return buf.combine(out.x, out.handle, topk_weights=out.topk_weights)

        x = xs[comm.rank].clone().requires_grad_()
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, ids[comm.rank], weights[comm.rank])
        y.float().sum().backward()
        comm.barrier()
        return y.detach(), x.grad

    for r, (y, grad) in enumerate(moecomm.run_local(compiled, 2)):
        factor = (weights[r] * (ids[r] >= 0)).sum(1, keepdim=True)
        torch.testing.assert_close(y.float(), xs[r].float() * factor, rtol=0.03, atol=0.03)
        torch.testing.assert_close(grad.float(), factor.expand(-1, 32), rtol=0.03, atol=0.03)
