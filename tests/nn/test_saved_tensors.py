"""Backward with hooks on saved tensors.

Copies (activation offload, compression) refer to the same dispatch, and keep its memory no longer than originals.
"""

import gc

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.utils.checkpoint import checkpoint

import moecomm
from moecomm.nn import MoE

SHAPE = dict(hidden=64, num_experts=4, top_k=2, max_tokens=16, dtype=torch.float32)


def copies():
    """Hooks that save a copy of every tensor and return another one."""
    return saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone())


def layer_of(comm, dispatches=6):
    """Return a layer, its buffer and this rank's tokens."""
    buf = moecomm.Buffer(
        comm, **SHAPE, arena_bytes=moecomm.Buffer.arena_hint(comm, **SHAPE, dispatches=dispatches)
    )
    torch.manual_seed(0)
    return MoE(64, 32, 4, 2, buffer=buf), torch.randn(16, 64, requires_grad=True)


def pieces(buf):
    """Number of pieces of the arena in use."""
    gc.collect()
    return buf.backend.memory.native.arena()[1]


WAYS = {
    "copies": lambda layer, x: inside(copies(), layer, x),
    "twice": lambda layer, x: inside(copies(), lambda v: inside(copies(), layer, v), x),
    "save_on_cpu": lambda layer, x: inside(torch.autograd.graph.save_on_cpu(), layer, x),
    "offload_wrapper": lambda layer, x: offload_wrapper(layer)(x),
    "checkpoint_wrapper": lambda layer, x: checkpoint_wrapper(layer)(x),
    "checkpoint of copies": lambda layer, x: checkpoint(
        lambda v: inside(copies(), layer, v), x, use_reentrant=False
    ),
    "copies of checkpoint": lambda layer, x: inside(
        copies(), lambda v: checkpoint(layer, v, use_reentrant=False), x
    ),
}


def inside(context, layer, x):
    """Return the layer's result, computed inside a context."""
    with context:
        return layer(x)


@pytest.mark.parametrize("way", WAYS)
def test_gradients(way):
    """Gradients equal those of a plain backward; then the arena is free, although the loss exists.

    Not bit for bit: a copy has another address, and torch's matrix product on CPUs may round differently there.
    """

    def main(comm):
        layer, x = layer_of(comm)
        layer(x).square().sum().backward()
        want, x.grad = x.grad, None
        loss = WAYS[way](layer, x).square().sum()
        loss.backward()
        torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-5)
        assert pieces(layer.buffer) == 0 and loss.requires_grad
        comm.barrier()

    moecomm.run_local(main, 2)


def test_graph_is_kept_or_differentiated_twice():
    comm = moecomm.Communicator()
    layer, x = layer_of(comm)
    grads = []
    for context in (torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), copies()):
        y = inside(context, layer, x).pow(3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
        (again,) = torch.autograd.grad(y, x)
        grads.append((first.detach(), second, again))
        del y, first
    for have, want in zip(*grads, strict=True):
        torch.testing.assert_close(have, want)
    assert pieces(layer.buffer) == 0


def test_forward_without_backward_holds_nothing():
    comm = moecomm.Communicator()
    layer, x = layer_of(comm)
    y = inside(copies(), layer, x)
    assert pieces(layer.buffer) > 0
    del y
    assert pieces(layer.buffer) == 0


def test_checkpoint_holds_nothing_between_forward_and_backward():
    comm = moecomm.Communicator()
    layer, x = layer_of(comm)
    y = checkpoint(layer, x, use_reentrant=False)
    assert pieces(layer.buffer) == 0 and y.requires_grad
