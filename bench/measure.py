"""Measurement of one routing: moecomm and the baselines alternate. Results are overwritten before and checked after.

The time of a call is that from the start of the first rank to the end of the last, after a barrier. Dispatch and
combine are timed separately, with the work of the experts (not timed) between them. A round trip is their sum.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import torch

import moecomm

from . import baselines as alternatives
from . import check
from .caches import Eviction, last_level_bytes
from .floor import Floor
from .routing import make_inputs

OPS = ("dispatch", "combine", "roundtrip")
OWN = "moecomm"


@dataclass
class Measured:
    """Results of a measurement: times, wrong elements and bytes."""

    times: dict = field(default_factory=dict)  # {contender: {op: [seconds per call]}}
    wrong: dict = field(default_factory=dict)  # {contender: {op: number of wrong elements}}
    hops: dict = field(default_factory=dict)  # {op: stats summed over ranks, mean per iteration}
    plan: list = field(default_factory=list)  # seconds of dispatches with rows of 16 bytes
    floor: dict = field(default_factory=dict)  # {op: seconds}
    in_cache: bool = False  # whether the results of a dispatch fit into the last-level caches
    rail: str = "none"
    straight_bytes: float = 0.0  # bytes between nodes of a round trip with one row per token and rank

    def median(self, name, op):
        """Median in microseconds."""
        return 1e6 * float(np.median(self.times[name][op]))

    def p99(self, name, op):
        """99th percentile in microseconds."""
        return 1e6 * float(np.percentile(self.times[name][op], 99))


class Own:
    """moecomm as a contender."""

    name = OWN

    def __init__(self, comm, case, world):
        self._case, self._world = case, world
        options = dict(
            num_experts=case.experts, top_k=case.top_k, max_tokens=case.tokens, channels=case.channels or None
        )
        self.buffer = moecomm.Buffer(
            comm, hidden=case.hidden, dtype=alternatives.TORCH_DTYPES[case.dtype], **options
        )
        # Rows of 16 bytes, to measure the plan with hardly any payload.
        self.small = moecomm.Buffer(comm, hidden=8, dtype=torch.bfloat16, **options)
        self.y = torch.empty(
            (case.tokens_of(comm.rank), case.hidden), dtype=alternatives.TORCH_DTYPES[case.dtype]
        )
        self._small_x = torch.zeros((len(self.y), 8), dtype=torch.bfloat16)
        self.out = None

    def prepare(self, ids, weights):
        """Set the routing of the next calls."""
        self._ids, self._weights = ids, weights

    def poison(self, value):
        """Overwrite the results. The next dispatch uses the same block of the arena as the last one."""
        self.y.fill_(value)
        if self.out is not None:
            self.out.x.fill_(value)
            self.out.handle.rows.fill_(value)
        self.out = None

    def dispatch(self, x):
        """Dispatch; return the rows in the window."""
        self.out = self.buffer.dispatch(x, self._ids, self._weights, layout=self._case.layout)
        return self.out.x

    def expert(self, rows, rank):
        """Compute the experts; they write to the memory that combine reads."""
        return check.expert_output(rows, rank, self.out.handle.rows)

    def combine(self, rows):
        """Combine; return y."""
        weights = self.out.topk_weights if self._case.layout == "expert" else None
        return self.buffer.combine(rows, self.out.handle, topk_weights=weights, out=self.y)

    def plan(self):
        """Run a dispatch with rows of 16 bytes."""
        self.small.dispatch(self._small_x, self._ids, self._weights, layout=self._case.layout)

    def close(self):
        """Release the windows."""
        self.out = None
        self.buffer.close()
        self.small.close()


class Baseline:
    """A baseline as a contender."""

    def __init__(self, name, world, case):
        self.name, self._inner = name, alternatives.make(name, world, case)
        self.poison, self.dispatch, self.combine, self.prepare = (
            self._inner.poison,
            self._inner.dispatch,
            self._inner.combine,
            self._inner.prepare,
        )

    def expert(self, rows, rank):
        """Compute the experts in place."""
        return check.expert_output(rows, rank, rows)


def measure(world, case, *, baselines=(), iters=20, warmup=3, cold=False, progress=lambda text: None):
    """Measure the routing of one case. Collective over world, whose size is case.ranks.

    cold : bool
        Evict the caches before every timed call.

    Returns Measured, equal on all ranks.
    """
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.size))
    progress("making inputs")
    rank, tokens, rounds = world.rank, case.tokens_of(world.rank), warmup + iters
    own = make_inputs(case, rank, spare=rounds)
    all_ids, all_weights = zip(*world.allgather((own.ids, own.weights)))
    stride = max(len(a) for a in all_ids)
    table = world.table(own.x, stride)

    sums = dict(num_experts=case.experts, size=world.size, layout=case.layout)
    node_of = [r // case.ranks_per_node for r in range(world.size)]
    progress("computing the expected results")
    wanted = check.combined(
        own.x,
        own.ids,
        own.weights,
        group_of=node_of,
        rounded=[n != node_of[rank] for n in range(case.nodes)],
        **sums,
    )
    if baselines:
        straight = (
            dict(group_of=list(range(world.size)), rounded=[True] * world.size)
            if case.layout == "expert"
            else dict(group_of=[0] * world.size, rounded=[False])
        )
        wanted_straight = check.combined(own.x, own.ids, own.weights, **straight, **sums)

    result = Measured()
    with moecomm.Communicator(world.group, ranks_per_node=case.ranks_per_node) as comm:
        subject = Own(comm, case, world)
        result.rail = _describe_rail(comm, subject.buffer)
        contenders = [subject, *(Baseline(name, world, case) for name in baselines)]
        floor = Floor(world, case)
        before = Eviction(world.size) if cold else _nothing
        for contender in contenders:
            result.times[contender.name] = {op: [] for op in OPS}
            result.wrong[contender.name] = dict.fromkeys(OPS, 0)
        result.hops = {op: [] for op in OPS[:2]}
        for i in range(rounds):
            progress(f"iteration {i + 1} of {rounds}")
            keep = i >= warmup
            x, ids = own.x[i : i + tokens], [a[i : i + case.tokens_of(r)] for r, a in enumerate(all_ids)]
            weights = [a[i : i + case.tokens_of(r)] for r, a in enumerate(all_weights)]
            source, token = check.received_order(ids, rank, num_experts=case.experts, layout=case.layout)
            index = source * stride + token + i
            subject.prepare(ids[rank], weights[rank])
            if baselines:
                routes = alternatives.Routes(case, rank, ids, weights)
                away = sum(n for r, n in enumerate(routes.send_counts) if node_of[r] != node_of[rank])
                result.straight_bytes += 2 * case.row_bytes * sum(world.allgather(away)) / rounds
            for turn in range(len(contenders)):
                contender = contenders[(i + turn) % len(contenders)]
                is_own = contender is subject
                if not is_own:
                    contender.prepare(routes)
                contender.poison(float("nan"))
                subject.buffer.stats()
                before()
                rows, dispatched = world.timed(contender.dispatch, x)
                dispatch_stats = subject.buffer.stats()
                wrong_rows = check.count_wrong(rows, table, index)
                rows = contender.expert(rows, rank)
                before()
                y, combined = world.timed(contender.combine, rows)
                combine_stats = subject.buffer.stats()
                del rows
                wrong_sums = check.count_wrong(y, (wanted if is_own else wanted_straight)[i : i + tokens])
                for op, seconds, wrong in zip(
                    OPS,
                    (dispatched, combined, dispatched + combined),
                    (wrong_rows, wrong_sums, wrong_rows + wrong_sums),
                ):
                    result.wrong[contender.name][op] += wrong
                    if keep:
                        result.times[contender.name][op].append(seconds)
                if keep and is_own:
                    result.hops["dispatch"].append(dispatch_stats)
                    result.hops["combine"].append(combine_stats)
            _, planned = world.timed(subject.plan)
            loop = floor.measure(x, ids, weights, before=before)
            rates = floor.rates(before=before)
            if keep:
                result.plan.append(planned)
                floor.keep(
                    loop,
                    rates,
                    dispatch_stats=result.hops["dispatch"][-1],
                    combine_stats=result.hops["combine"][-1],
                    tokens=tokens,
                )
        result.floor = floor.seconds()
        result.in_cache = not cold and floor.working_set() < last_level_bytes()
        subject.close()
        comm.barrier()
    result.wrong = {
        name: {op: sum(everyone[op] for everyone in world.allgather(ops)) for op in OPS}
        for name, ops in result.wrong.items()
    }
    result.hops = _summed(result.hops, world)
    return result


def _nothing():
    """Do nothing before a timed call: the caches stay warm."""


def _summed(hops, world):
    """{op: {hop: {counter: mean per call, over all ranks}}}"""
    out = {}
    for op, calls in hops.items():
        everyone = [stats for each in world.allgather(calls) for stats in each]
        out[op] = {
            hop: {name: sum(s[hop][name] for s in everyone) / len(calls) for name in everyone[0][hop]}
            for hop in ("rail", "node")
        }
    out["roundtrip"] = {
        hop: {name: out["dispatch"][hop][name] + out["combine"][hop][name] for name in out["dispatch"][hop]}
        for hop in ("rail", "node")
    }
    return out


def _describe_rail(comm, buffer):
    """Describe the transport between nodes."""
    if comm.num_nodes == 1:
        return "none (one node)"
    if buffer.backend.memory.native.rail_is_mapped():
        return f"{comm.rail}, memory of peers mapped (nodes share this host)"
    return f"{comm.rail}, UCX_TLS={os.environ.get('UCX_TLS', 'all')}"
