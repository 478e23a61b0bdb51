"""The operators: derivatives compared with finite differences and plain torch, traced shapes, checkpoints."""

import itertools

import pytest
import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture
from layers import LAYOUTS, layer, make_buffer, plain_layer
from worlds import assert_same, random_world

import moecomm
from moecomm import ops, reference, tickets

pytestmark = pytest.mark.usefixtures("either_world")


@pytest.mark.parametrize(
    "nodes,per_node,tokens", [(1, 1, [6]), (1, 2, [5, 0]), (2, 2, [4, 0, 7, 3]), (3, 1, [1, 2, 9])]
)
@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(layout="rank"),
        dict(expert_alignment=4),
        dict(capacity=80),
        dict(layout="rank", capacity=40),
    ],
    ids=["expert", "rank", "padded", "capacity", "rank-capacity"],
)
def test_gradients_equal_plain_torch(nodes, per_node, tokens, how):
    """x, topk_weights, the experts' parameters and the bias in float64, also if a rank has no tokens."""
    size, hidden = nodes * per_node, 8
    world = random_world(
        size, tokens, hidden, 4 * size, 3, dtype=torch.float64, seed=size + len(how), masked=0.3
    )
    xs, ids, weights = world
    generator = torch.Generator().manual_seed(1)
    scale, bias = (
        torch.randn(4 * size, hidden, generator=generator, dtype=torch.float64),
        torch.randn(hidden, generator=generator),
    )
    grads = [torch.randn(t, hidden, generator=generator, dtype=torch.float64) for t in tokens]

    def ours(comm):
        buf = make_buffer(comm, world, 4 * size, channels=2)
        leaves = [t.clone().requires_grad_() for t in (xs[comm.rank], weights[comm.rank], scale, bias)]
        y = layer(buf, leaves[0], ids[comm.rank], leaves[1], leaves[2], bias=leaves[3], **how)
        y.backward(grads[comm.rank])
        return y.detach(), [leaf.grad for leaf in leaves]

    leaves = [[t.clone().requires_grad_() for t in ts] for ts in (xs, weights)] + [
        scale.clone().requires_grad_(),
        bias.clone().requires_grad_(),
    ]
    want = plain_layer(leaves[0], ids, leaves[1], leaves[2], leaves[3])
    torch.autograd.backward(want, grads)
    got = moecomm.run_local(ours, size, ranks_per_node=per_node)
    for rank, (y, (x, w, _, _)) in enumerate(got):
        torch.testing.assert_close(y, want[rank], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x, leaves[0][rank].grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(w, leaves[1][rank].grad, rtol=1e-5, atol=1e-5)
        assert not w[ids[rank] < 0].any(), "a slot without a pick has a gradient"
    torch.testing.assert_close(sum(g[2] for _, g in got), leaves[2].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(g[3] for _, g in got), leaves[3].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    """Finite differences of x, rows and topk_weights, first and second order, one rank."""
    world = random_world(1, 3, 4, 4, 2, dtype=torch.float64, seed=3, masked=0.3)
    (x,), (ids,), (weights,) = world

    def run(comm):
        buf = make_buffer(comm, world, 4)
        out = buf.dispatch(x, ids, weights, layout=layout)
        handle = out.handle.tensor()
        rows = torch.randn(out.x.shape, dtype=torch.float64, requires_grad=True)
        n = len(rows)
        x64, w32 = x.clone().requires_grad_(), weights.clone().requires_grad_()
        back = torch.rand(out.topk_weights.shape, requires_grad=True)
        row_weights = torch.rand(n, requires_grad=True) if layout == "expert" else None
        bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

        def weighted(f):  # float32 weights enter linearly, so a wide step is exact except for rounding
            return (
                dict(eps=2.0**-4, atol=1e-4, rtol=1e-4, fast_mode=False, nondet_tol=0.0)
                if f
                else dict(eps=1e-6, atol=1e-8)
            )

        def dispatched(a, w):
            return [t for t in buf_dispatch(a, w) if t.is_floating_point() and t.numel()]

        def buf_dispatch(a, w):
            return ops.dispatch(a, ids, w, None, buf.name, layout, 1, None)[0:3]

        check = torch.autograd.gradcheck
        assert check(lambda a: dispatched(a, weights), (x64,), **weighted(False))
        assert check(
            lambda a: ops.redispatch(a, None, None, handle, buf.name, layout, n)[0],
            (x64,),
            **weighted(False),
        )
        assert check(
            lambda r: ops.combine(r, row_weights, None, handle, buf.name, layout, 3),
            (rows,),
            **weighted(False),
        )
        assert check(
            lambda r: ops.combine_slots(r, back.detach(), handle, buf.name, layout, 3)[0],
            (rows,),
            **weighted(False),
        )
        assert check(
            lambda b: ops.combine(rows.detach(), None, b, handle, buf.name, layout, 3),
            (bias,),
            eps=2.0**-8,
            atol=1e-3,
        )
        assert torch.autograd.gradgradcheck(
            lambda a: ops.redispatch(a, None, None, handle, buf.name, layout, n)[0], (x64,)
        )
        assert torch.autograd.gradgradcheck(
            lambda r: ops.combine(r, row_weights, None, handle, buf.name, layout, 3), (rows,)
        )
        # gradcheck warns about float32 inputs; the functions are linear in them, so the wide step is exact.
        wide = weighted(True)
        assert check(lambda w: dispatched(x, w)[1].double(), (w32,), **wide)
        assert check(
            lambda b: ops.combine_slots(rows.detach(), b, handle, buf.name, layout, 3)[1].double(),
            (back,),
            **wide,
        )
        if row_weights is not None:
            assert check(
                lambda w: ops.combine(rows.detach(), w, None, handle, buf.name, layout, 3),
                (row_weights,),
                **wide,
            )

    moecomm.run_local(run, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_moves_what_the_forward_of_the_other_moves(layout):
    """The backward of dispatch is a combine with the same plan and vice versa, bit for bit; bf16, two nodes."""
    size, experts = 4, 8
    world = random_world(size, [5, 3, 0, 7], 64, experts, 3, seed=11)
    xs, ids, weights = world
    want = reference.dispatch(xs, ids, weights, num_experts=experts, layout=layout)
    generator = torch.Generator().manual_seed(2)
    grad_rows = [torch.randn(w.x.shape, generator=generator).bfloat16() for w in want]
    expected = reference.combine(grad_rows, want, [len(x) for x in xs], ranks_per_node=2)
    grad_y = [torch.randn(x.shape, generator=generator).bfloat16() for x in xs]
    expected_rows = reference.dispatch(grad_y, ids, None, num_experts=experts, layout=layout)

    def run(comm):
        buf = make_buffer(comm, world, experts)
        x = xs[comm.rank].clone().requires_grad_()
        out = buf.dispatch(x, ids[comm.rank], weights[comm.rank], layout=layout)
        assert_same(out.x.detach(), want[comm.rank].x, "x")
        assert_same(out.source_token, want[comm.rank].source_token, "source_token")
        out.x.backward(grad_rows[comm.rank])
        assert_same(x.grad, expected[comm.rank], f"rank {comm.rank}: gradient of x")
        rows = out.x.detach().clone().requires_grad_()
        buf.combine(rows, out.handle).backward(grad_y[comm.rank])
        assert_same(rows.grad, expected_rows[comm.rank].x, f"rank {comm.rank}: gradient of rows")
        assert buf.stats()["calls"] == 4

    moecomm.run_local(run, size, ranks_per_node=2)


def test_padding_rows_have_zero_gradients():
    world = random_world(2, 4, 16, 4, 2, dtype=torch.float32, seed=5)
    xs, ids, weights = world

    def run(comm):
        buf = make_buffer(comm, world, 4)
        out = buf.dispatch(xs[comm.rank], ids[comm.rank], weights[comm.rank], expert_alignment=8)
        rows = torch.randn_like(out.x).requires_grad_()
        row_weights = torch.rand(len(rows)).requires_grad_()
        buf.combine(rows, out.handle, topk_weights=row_weights).sum().backward()  # sum: an expanded gradient
        padding = out.source_token < 0
        assert padding.any() and not rows.grad[padding].any() and not row_weights.grad[padding].any()
        real = ~padding
        torch.testing.assert_close(rows.grad[real], row_weights.detach()[real, None].expand(-1, 16))

    moecomm.run_local(run, 2)


def test_in_place_rows_and_repeated_handles_are_differentiable():
    world = random_world(2, 6, 16, 4, 2, dtype=torch.float64, seed=6)
    xs, ids, weights = world

    def run(comm):
        buf = make_buffer(comm, world, 4)
        x = xs[comm.rank].clone().requires_grad_()
        out = buf.dispatch(x, ids[comm.rank], weights[comm.rank])
        out.handle.rows.copy_(out.x * 3)  # written to the window
        y = buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights)
        (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        staged = buf.stats()["staged_rows"]
        again = buf.dispatch(x, topk_weights=weights[comm.rank], handle=out.handle)
        assert again.x.requires_grad and again.scales is None and again.topk_ids is None
        for name in ("source_rank", "source_token", "tokens_per_expert", "rows_per_expert"):
            assert_same(getattr(again, name), getattr(out, name), name)
        y = buf.combine(again.x * 3, out.handle, topk_weights=out.topk_weights)
        (second,) = torch.autograd.grad(y.sum(), x)
        assert_same(first, second, "gradient of x")
        assert staged == len(out.x), (
            staged
        )  # the gradient's rows of dispatch; the experts' rows were read in place
        del out, again, y, first, second
        import gc

        gc.collect()
        assert buf.backend.memory.native.arena()[1] == 0, "something still holds a piece of the window"

    moecomm.run_local(run, 2)


def test_without_gradients_the_operators_are_not_called(monkeypatch):
    def fail(*_):
        raise AssertionError("the operator was called")

    monkeypatch.setattr(ops, "dispatch", fail)
    monkeypatch.setattr(ops, "combine", fail)
    x = torch.randn(3, 16, requires_grad=True)
    ids = torch.tensor([[0, 1]] * 3)

    def run(comm):
        buf = moecomm.Buffer(comm, hidden=16, num_experts=2, top_k=2, max_tokens=4, dtype=torch.float32)
        with torch.no_grad():
            out = buf.dispatch(x, ids)
            buf.combine(out.x, out.handle)
        with pytest.raises(AssertionError, match="operator"):
            buf.dispatch(x, ids)

    moecomm.run_local(run, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("capacity", [None, 12])
def test_opcheck(layout, capacity, monkeypatch):
    """Schemas, fake shapes and traced derivatives match the operators."""
    # opcheck compares outputs, and handles of two calls differ, so here all have one number (and equal plans).
    monkeypatch.setattr(tickets, "_numbers", itertools.repeat(-2))
    monkeypatch.setattr(tickets, "_tickets", {})
    world = random_world(1, 5, 8, 4, 2, dtype=torch.float32, seed=8)
    (x,), (ids,), (weights,) = world

    def run(comm):
        buf = make_buffer(comm, world, 4)
        need = dict(
            test_utils=(
                "test_schema",
                "test_autograd_registration",
                "test_faketensor",
                "test_aot_dispatch_static",
            )
        )
        grad = [t.clone().requires_grad_() for t in (x, weights)]
        torch.library.opcheck(
            ops.dispatch.default,
            (grad[0], ids, grad[1], None, buf.name, layout, 1, capacity),
            **(need if capacity else dict(test_utils=need["test_utils"][:3])),
        )
        out = buf.dispatch(x, ids, weights, layout=layout, capacity=capacity)
        handle, n = out.handle.tensor(), len(out.x)
        rows, back = out.x.clone().requires_grad_(), out.topk_weights.clone().requires_grad_()
        bias = torch.randn(8, requires_grad=True)
        torch.library.opcheck(
            ops.redispatch.default, (grad[0], grad[1], None, handle, buf.name, layout, n), **need
        )
        torch.library.opcheck(
            ops.combine.default,
            (rows, back if layout == "expert" else None, bias, handle, buf.name, layout, 5),
            **need,
        )
        torch.library.opcheck(ops.combine_slots.default, (rows, back, handle, buf.name, layout, 5), **need)

    moecomm.run_local(run, 1)


def test_async_calls_are_differentiable_and_hooks_run():
    world = random_world(2, 5, 16, 4, 2, dtype=torch.float64, seed=12)
    xs, ids, weights = world

    def run(comm):
        buf = make_buffer(comm, world, 4)
        seen = []
        handles = [
            buf.register_hook(stage, lambda value, stage=stage: seen.append((stage, type(value).__name__)))
            for stage in ("pre_dispatch", "post_dispatch", "pre_combine", "post_combine")
        ]

        def gradient(async_op):
            x = xs[comm.rank].clone().requires_grad_()
            out = buf.dispatch(x, ids[comm.rank], weights[comm.rank], async_op=async_op)
            out = out.wait() if async_op else out
            y = buf.combine(out.x * 2, out.handle, topk_weights=out.topk_weights, async_op=async_op)
            y = y.wait() if async_op else y
            y.square().sum().backward()
            return x.grad

        assert_same(gradient(True), gradient(False), "gradient of x")
        assert (
            seen
            == [
                ("pre_dispatch", "Tensor"),
                ("post_dispatch", "Dispatched"),
                ("pre_combine", "Tensor"),
                ("post_combine", "Tensor"),
            ]
            * 2
        )
        for handle in handles:
            handle.remove()
        gradient(False)
        assert len(seen) == 8
        with pytest.raises(moecomm.InvalidArgument, match="stage is 'dispatch'"):
            buf.register_hook("dispatch", print)

    moecomm.run_local(run, 2)


@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_some_ranks_have_their_gradients(nodes, per_node, layout):
    """Rank 0 gives no weights: its experts still contribute to the gradients of the other ranks."""
    size = nodes * per_node
    world = random_world(
        size, 5, 16, 2 * size, 3 if size > 1 else 2, dtype=torch.float32, seed=13, masked=0.2
    )
    xs, ids, weights = world

    def run(comm):
        buf = make_buffer(comm, world, 2 * size)
        mine = weights[comm.rank].clone().requires_grad_() if comm.rank else None
        x = xs[comm.rank].clone().requires_grad_()
        out = buf.dispatch(x, ids[comm.rank], mine, layout=layout)
        ((out.topk_weights * (comm.rank + 1)).sum() + out.x.sum()).backward()
        return None if mine is None else mine.grad

    for rank, got in enumerate(moecomm.run_local(run, size, ranks_per_node=per_node)):
        if rank:
            assert_same(
                got,
                torch.where(ids[rank] < 0, 0.0, ids[rank] // 2 + 1.0),
                f"rank {rank}: gradient of its weights",
            )


@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("odd", [0, 1])
def test_ranks_that_disagree_about_slots_learn_it(nodes, per_node, odd, either_world):  # noqa: F811
    if either_world != "cpu":
        pytest.skip("told by a later call there: tests/cuda/test_cuda_faults.py")
    size = nodes * per_node
    world = random_world(size, 5, 16, 2 * size, 2, dtype=torch.float32, seed=14)
    xs, ids, weights = world

    def run(comm):
        buf = make_buffer(comm, world, 2 * size)
        out = buf.dispatch(xs[comm.rank], ids[comm.rank], weights[comm.rank])
        rows, handle = out.x.clone(), out.handle.tensor()
        try:
            if comm.rank == odd:
                ops.combine(rows, None, None, handle, buf.name, "expert", 5)
            else:
                ops.combine_slots(rows, out.topk_weights.clone(), handle, buf.name, "expert", 5)
        except moecomm.ConfigMismatch as error:
            assert "combine_slots" in str(error) and error.op == "combine" and error.rank == comm.rank
            again = buf.dispatch(
                xs[comm.rank], ids[comm.rank], weights[comm.rank]
            )  # all ranks have the error, so they are in step
            assert torch.equal(again.x, rows)
            assert torch.equal(buf.combine(again.x, again.handle), buf.combine(rows, out.handle))
            return True

    assert moecomm.run_local(run, size, ranks_per_node=per_node, timeout=15) == [True] * size
