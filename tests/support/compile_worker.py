"""A compiled MoE layer on several ranks. test_nn.py runs this with mpirun.

Prints the difference from eager on every rank.
"""

import torch

import moecomm
from moecomm.nn import MoE

HIDDEN, EXPERTS, TOP_K = 32, 8, 2

with moecomm.Communicator() as comm:
    tokens = 5 + 2 * comm.rank
    shape = dict(hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=16, dtype=torch.float32)
    buffer = moecomm.Buffer(comm, **shape, arena_bytes=moecomm.Buffer.arena_hint(comm, **shape, dispatches=6))
    torch.manual_seed(comm.rank)
    layers = torch.nn.Sequential(
        *(MoE(HIDDEN, 16, EXPERTS, TOP_K, 1, buffer, capacity=16 * TOP_K * comm.size) for _ in range(2))
    )
    compiled = torch.compile(layers, fullgraph=True, dynamic=False, backend="aot_eager")

    def gradients(f, x):
        """Return y and all gradients."""
        layers.zero_grad()
        x = x.clone().requires_grad_()
        y = f(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *[p.grad.clone() for p in layers.parameters()]]

    worst = 0.0
    for _ in range(2):
        x = torch.randn(tokens, HIDDEN)
        for got, want in zip(gradients(compiled, x), gradients(layers, x), strict=True):
            worst = max(worst, float((got - want).abs().max() / (1 + want.abs().max())))
    print(f"rank {comm.rank}: compiled and eager differ by {worst:.1e}", flush=True)
    comm.barrier()
