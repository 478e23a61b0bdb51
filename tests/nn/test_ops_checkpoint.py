"""Activation checkpointing of the operators, and copied handles."""

import pytest
import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture
from layers import LAYOUTS, make_buffer
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from worlds import assert_same, random_world

import moecomm
from moecomm import ops


def _mlp(buf, ids, how):
    def block(x, weights, w):
        out = buf.dispatch(x @ w, ids, weights, **how)
        return buf.combine(
            torch.tanh(out.x),
            out.handle,
            topk_weights=None if out.handle.layout == "rank" else out.topk_weights,
        )

    return block


@pytest.mark.parametrize("policy", ["recompute", "save"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing(policy, layout):
    """Full recomputation, and a selective policy that keeps communicated tensors; both give the plain gradients."""
    world = random_world(2, 6, 16, 4, 2, dtype=torch.float64, seed=9)
    xs, ids, weights = world
    ours = {ops.dispatch.default, ops.combine.default}

    def policy_fn(_, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in ours else CheckpointPolicy.PREFER_RECOMPUTE

    def run(comm):
        buf = make_buffer(comm, world, 4)
        block = _mlp(buf, ids[comm.rank], dict(layout=layout))

        def leaves():
            g = torch.Generator().manual_seed(0)
            return [
                t.clone().requires_grad_()
                for t in (
                    xs[comm.rank],
                    weights[comm.rank],
                    torch.randn(16, 16, generator=g, dtype=torch.float64),
                )
            ]

        plain, kept = leaves(), leaves()
        block(*plain).square().sum().backward()
        assert buf.stats()["calls"] == 4
        more = (
            {}
            if policy == "recompute"
            else dict(context_fn=lambda: create_selective_checkpoint_contexts(policy_fn))
        )
        y = checkpoint(block, *kept, use_reentrant=False, **more)
        y.square().sum().backward()
        calls = buf.stats()["calls"]
        # Recomputation stops once backward has its inputs; a saved dispatch is not repeated.
        assert calls == 4 if policy == "save" else 5 <= calls <= 6, calls
        for a, b in zip(plain, kept, strict=True):
            assert_same(b.grad, a.grad, "gradient")

    moecomm.run_local(run, 2)


def test_a_copied_handle_is_refused():
    world = random_world(1, 3, 16, 2, 2, dtype=torch.float32, seed=10)
    (x,), (ids,), _ = world

    def run(comm):
        buf = make_buffer(comm, world, 2)
        copy = buf.dispatch(x, ids).handle.tensor().clone()
        with pytest.raises(moecomm.InvalidArgument, match="handle of a dispatch"):
            ops.combine(torch.zeros(6, 16), None, None, copy, buf.name, "expert", 3)
        with pytest.raises(moecomm.InvalidArgument, match="no living Buffer"):
            ops.dispatch(x, ids, None, None, "#0", "expert", 1, None)

    moecomm.run_local(run, 1)
