"""The end-to-end part of `python -m bench balance`: a layer's step on the cpu world, with skewed routing of real text.

The ranks of one machine share its cores, so an overloaded rank would borrow time from idle ones. Experts therefore do
what accelerators do from the host's point of view: they take time in proportion to their rows, and no core.
"""

from __future__ import annotations

import time

import numpy as np
import torch

import moecomm
from moecomm.balance import rebalance

from . import routing
from .cases import Case

CASE = Case(nodes=2, ranks_per_node=4, tokens=256, hidden=1024, experts=64, top_k=2, routing="text", dtype="f32")
SECONDS_PER_ROW = 50e-6
STEPS = 15


def scale_of(experts):
    """What expert e multiplies by."""
    return torch.rand(experts, generator=torch.Generator().manual_seed(3)) + 0.5


def steps_of(comm, inputs, placement, mode):
    """(step times, rows per step) of this rank; every result is compared with a dense computation."""
    scale, size = scale_of(CASE.experts), comm.size
    options = {} if placement is None else dict(placement=placement, replicas=mode)
    buf = moecomm.Buffer(comm, hidden=CASE.hidden, num_experts=CASE.experts, top_k=CASE.top_k, max_tokens=CASE.tokens, dtype=torch.float32, **options)
    if placement is None:
        local = torch.arange(CASE.experts).view(size, -1)[comm.rank]
    else:
        local = placement.physical_to_logical[0].view(size, -1)[comm.rank]
    times, rows = [], []
    for step in range(STEPS):
        x, ids, weights = (t[step:step + CASE.tokens].contiguous() for t in (inputs.x, inputs.ids, inputs.weights))
        comm.barrier()
        start = time.perf_counter()
        out = buf.dispatch(x, ids, weights)
        torch.mul(out.x, scale[torch.repeat_interleave(local, out.tokens_per_expert)][:, None], out=out.handle.rows)
        time.sleep(SECONDS_PER_ROW * len(out.x))
        y = buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights)
        comm.barrier()
        times.append(time.perf_counter() - start)
        rows.append(len(out.x))
        torch.testing.assert_close(y, x * (weights * scale[ids]).sum(1, keepdim=True), rtol=1e-4, atol=1e-4)
    comm.barrier()
    return times, rows


def run(args):
    """Rows for: experts as they are numbered, and redundant ones, with the even and the optimal split."""
    inputs = [routing.make_inputs(CASE, r, spare=STEPS + CASE.tokens) for r in range(CASE.ranks)]
    earlier = torch.cat([i.ids[-CASE.tokens:] for i in inputs]).flatten()   # other text than the steps' own
    load = torch.bincount(earlier, minlength=CASE.experts)[None].double() + 1
    placement = rebalance(load, num_replicas=CASE.experts + 2 * CASE.ranks, num_nodes=CASE.nodes, num_ranks=CASE.ranks, connected=True)
    plain = None
    for name, table, mode in (("as numbered", None, ""), ("even", placement, "even"), ("local", placement, "local"), ("optimal", placement, "optimal")):
        results = moecomm.run_local(lambda comm: steps_of(comm, inputs[comm.rank], table, mode), CASE.ranks, ranks_per_node=CASE.ranks_per_node)
        rows = np.array([r for _, r in results])
        ms = 1e3 * float(np.median(np.max([t for t, _ in results], 0)))
        plain = plain or ms
        yield dict(case="step", load=f"text, {name}", got=float(np.mean(rows.mean(0) / rows.max(0))), bound=1.0, ms=ms,
                   note=f"{plain / ms:.2f}x as fast as numbered; verified; {CASE.nodes}x{CASE.ranks_per_node} rank threads, {CASE.tokens} tokens each")
