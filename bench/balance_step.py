"""End-to-end part of `python -m bench balance`: a step of a layer on the cpu world, with skewed routing of real text.

The ranks of one machine share its cores, so an overloaded rank would use the time of idle ranks. Experts therefore
behave like accelerators: they take time in proportion to their rows, but no core. All kinds of routing alternate step
by step, so that other load of the machine affects all of them equally.
"""

from __future__ import annotations

import time

import numpy as np
import torch

import moecomm
from moecomm.balance import rebalance

from . import routing
from .cases import Case

CASE = Case(
    nodes=2, ranks_per_node=4, tokens=256, hidden=1024, experts=64, top_k=2, routing="text", dtype="f32"
)
SECONDS_PER_ROW = 50e-6
STEPS = 40
KINDS = ("as numbered", "even", "local", "optimal")


def scale_of(experts):
    """Factors of the experts."""
    return torch.rand(experts, generator=torch.Generator().manual_seed(3)) + 0.5


class Layer:
    """One kind of routing on one rank: its Buffer, and the times between the parts of each step."""

    def __init__(self, comm, placement, kind):
        self.scale, self.comm = scale_of(CASE.experts), comm
        options = {} if kind == "as numbered" else dict(placement=placement, replicas=kind)
        self.buf = moecomm.Buffer(
            comm,
            hidden=CASE.hidden,
            num_experts=CASE.experts,
            top_k=CASE.top_k,
            max_tokens=CASE.tokens,
            dtype=torch.float32,
            **options,
        )
        slots = torch.arange(CASE.experts) if kind == "as numbered" else placement.physical_to_logical[0]
        self.local = slots.view(comm.size, -1)[comm.rank]
        self.clocks, self.rows, self.crossed = [], [], []

    def step(self, x, ids, weights):
        """Run one batch and compare the result with a dense computation."""
        self.comm.barrier()
        self.buf.stats()
        clock = [time.perf_counter()]
        out = self.buf.dispatch(x, ids, weights)
        clock.append(time.perf_counter())
        torch.mul(
            out.x,
            self.scale[torch.repeat_interleave(self.local, out.tokens_per_expert)][:, None],
            out=out.handle.rows,
        )
        # The time of the product is part of the experts' time.
        time.sleep(max(0.0, clock[1] + SECONDS_PER_ROW * len(out.x) - time.perf_counter()))
        clock.append(time.perf_counter())
        y = self.buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights)
        clock.append(time.perf_counter())
        self.clocks.append(clock)
        self.rows.append(len(out.x))
        self.crossed.append(self.buf.stats()["rail"]["physical_rows"])
        torch.testing.assert_close(
            y, x * (weights * self.scale[ids]).sum(1, keepdim=True), rtol=1e-4, atol=1e-4
        )


def steps_of(comm, inputs, placement):
    """Run all steps; return this rank's layers by kind."""
    layers = {kind: Layer(comm, placement, kind) for kind in KINDS}
    for step in range(STEPS):
        batch = [t[step : step + CASE.tokens].contiguous() for t in (inputs.x, inputs.ids, inputs.weights)]
        for turn in range(len(KINDS)):
            layers[KINDS[(step + turn) % len(KINDS)]].step(*batch)
    comm.barrier()
    return layers


def run(args):
    """Yield rows for experts without replicas, and for redundant experts with each mode of choosing replicas."""
    inputs = [routing.make_inputs(CASE, r, spare=STEPS + CASE.tokens) for r in range(CASE.ranks)]
    earlier = torch.cat([i.ids[-CASE.tokens :] for i in inputs]).flatten()  # text that no step uses
    load = torch.bincount(earlier, minlength=CASE.experts)[None].double() + 1
    placement = rebalance(
        load,
        num_replicas=CASE.experts + 2 * CASE.ranks,
        num_nodes=CASE.nodes,
        num_ranks=CASE.ranks,
        connected=True,
    )
    results = moecomm.run_local(
        lambda comm: steps_of(comm, inputs[comm.rank], placement),
        CASE.ranks,
        ranks_per_node=CASE.ranks_per_node,
    )
    plain = None
    for kind in KINDS:
        rows = np.array([r[kind].rows for r in results])  # [ranks, steps]
        clock = np.array([r[kind].clocks for r in results])  # [ranks, steps, seams]
        began, dispatched, computed, ended = np.moveaxis(clock, 2, 0)
        step = ended.max(0) - began.min(0)
        # Only the time that the balance can change: between the last end of dispatch and the last end of the experts.
        experts = computed.max(0) - dispatched.max(0)
        ms, dispatch, slowest, between, combine = (
            1e3 * float(np.median(t))
            for t in (
                step,
                dispatched.max(0) - began.min(0),
                SECONDS_PER_ROW * rows.max(0),
                experts,
                ended.max(0) - computed.max(0),
            )
        )
        plain = plain or ms
        crossed = np.sum([r[kind].crossed for r in results], 0).mean()
        yield dict(
            case="step",
            load=f"text, {kind}",
            got=float(np.mean(rows.mean(0) / rows.max(0))),
            bound=1.0,
            ms=ms,
            note=f"{plain / ms:.2f}x the speed of as numbered; dispatch {dispatch:.1f}, then experts {between:.1f} "
            f"(rows of the slowest rank {slowest:.1f}), combine {combine:.1f} ms; "
            f"{crossed:.0f} rows cross the rail; verified; {CASE.nodes}x{CASE.ranks_per_node} rank "
            f"threads, {CASE.tokens} tokens each",
        )
