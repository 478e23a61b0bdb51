"""Captured calls whose results are dropped, as in a model's forward: replays write only to memory kept for them."""

import gc

import pytest
import torch
from emulated_gpu import emulated  # noqa: F401 - a fixture
from worlds import assert_same

import moecomm

HIDDEN, TOKENS, CAPACITY = 128, 6, 40


def run(main):
    """Run main(comm) on one rank of an emulated GPU."""
    moecomm.run_local(main, 1, ranks_per_node=1, device="cuda:0", timeout=20.0)


def make(comm, **more):
    """Return a buffer, x, ids that pick all experts, and weights."""
    buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=2, top_k=2, max_tokens=TOKENS, num_sms=2, **more)
    return (
        buf,
        torch.ones((TOKENS, HIDDEN)).bfloat16(),
        torch.tensor([[0, 1]] * TOKENS),
        torch.ones((TOKENS, 2)),
    )


def step_of(buf, x, ids, weights, y, path):
    """Return a dispatch and a combine that keep only y, and torch's allocations between them, in the graph's pool."""
    eager = buf.dispatch(x, ids, weights, capacity=CAPACITY) if path in ("cached", "combine") else None
    pool = []

    def pooled(t):
        pool.append(t.detach())
        return t

    def step():
        if path == "ops":
            out = buf.dispatch(pooled(x.clone()).requires_grad_(), ids, weights, capacity=CAPACITY)
            pooled(buf.combine(out.x, out.handle, topk_weights=out.topk_weights))
            return
        out = (
            eager
            if path == "combine"
            else buf.dispatch(x, handle=eager.handle)
            if path == "cached"
            else buf.dispatch(x, ids, weights, capacity=CAPACITY, quant="fp8" if path == "quant" else None)
        )
        buf.combine(
            pooled(out.x.to(torch.bfloat16, copy=True)),
            out.handle,
            topk_weights=pooled(weights.new_ones(out.x.shape[0])),
            out=y,
        )

    return step, pool


@pytest.mark.parametrize("path", ["plain", "cached", "combine", "quant", "ops"])
def test_a_replay_leaves_what_later_calls_return_alone(emulated, path):  # noqa: F811
    def main(comm):
        buf, x, ids, weights = make(comm)
        y = torch.empty_like(x)
        step, pool = step_of(buf, x, ids, weights, y, path)
        step()
        with emulated.capture() as graph:
            step()
        del step
        gc.collect()
        other = torch.tensor([[1, -1]] * TOKENS)  # another plan
        live = [
            buf.dispatch(torch.full_like(x, 3.0 + i), other, weights, capacity=CAPACITY) for i in range(2)
        ]
        before = [(o.x.clone(), o.topk_weights.clone()) for o in live]
        y.fill_(float("nan"))
        graph.replay()
        assert_same(
            pool[-1] if path == "ops" else y,
            torch.full_like(x, 2.0 * (448 if path == "quant" else 1)),
            "the graph's y",
        )
        for i, (o, (rows, w)) in enumerate(zip(live, before, strict=True)):
            assert_same(o.x, rows, f"call {i}: x")
            assert_same(o.topk_weights, w, f"call {i}: weights")
            got = buf.combine(o.handle.rows.copy_(o.x), o.handle, topk_weights=o.topk_weights)
            assert_same(got, torch.full_like(x, 3.0 + i), f"call {i}: y")

    run(main)


def test_what_graphs_hold_is_counted_and_released(emulated):  # noqa: F811
    """Each capture keeps its own pieces.

    A lack of pieces is reported by name, and they are freed when the caller declares that no graph is replayed any
    more.
    """

    def main(comm):
        buf, x, ids, weights = make(comm)
        step, _ = step_of(buf, x, ids, weights, torch.empty_like(x), "plain")
        step()
        assert buf.captured_bytes == 0
        for _ in range(2):
            with emulated.capture():
                step()
        held = buf.captured_bytes
        with emulated.capture():
            step()
        assert buf.captured_bytes * 2 == held * 3
        with pytest.raises(
            moecomm.CapacityExceeded, match=r"calls in CUDA graphs keep \d+ .*release_captured"
        ):
            for _ in range(100):
                with emulated.capture():
                    step()
        buf.release_captured()
        assert buf.captured_bytes == 0
        step()

    run(main)


def test_nothing_is_held_on_the_cpu():
    def main(comm):
        buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=2, top_k=1, max_tokens=TOKENS)
        assert buf.captured_bytes == 0
        buf.release_captured()

    moecomm.run_local(main, 1)
