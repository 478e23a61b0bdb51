"""Measuring one routing: this library and its baselines take turns, every result is checked, every output
poisoned before.

A call's time is the span from the first rank's start to the last rank's end, after a barrier. Dispatch and combine
are timed apart with the experts' work (untimed) between them; a round trip is the sum of the two.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import torch

import moecomm

from . import baselines as alternatives
from . import check
from .floor import Floor
from .routing import make_inputs

OPS = ("dispatch", "combine", "roundtrip")
OWN = "moecomm"


@dataclass
class Measured:
    """Seconds per call of every contender and op, wrong elements, bytes per hop of one call over all ranks."""

    times: dict = field(default_factory=dict)  # {contender: {op: [seconds]}}
    wrong: dict = field(default_factory=dict)  # {contender: {op: elements}}
    hops: dict = field(default_factory=dict)  # {op: stats summed over ranks, mean per iteration}
    plan: list = field(default_factory=list)  # seconds of dispatches with rows of 16 bytes
    floor: dict = field(default_factory=dict)  # {op: [seconds]}
    rail: str = "none"
    straight_bytes: float = 0.0  # over the links between nodes, of a round trip with a row per token and rank

    def median(self, name, op):
        """Microseconds."""
        return 1e6 * float(np.median(self.times[name][op]))

    def p99(self, name, op):
        """Microseconds."""
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
        self.small = moecomm.Buffer(
            comm, hidden=8, dtype=torch.bfloat16, **options
        )  # the plan, and next to no payload
        self.y = torch.empty(
            (case.tokens_of(comm.rank), case.hidden), dtype=alternatives.TORCH_DTYPES[case.dtype]
        )
        self._small_x = torch.zeros((len(self.y), 8), dtype=torch.bfloat16)
        self.out = None

    def prepare(self, ids, weights):
        """The routing of the next calls."""
        self._ids, self._weights = ids, weights

    def poison(self, value):
        """The piece of the window that the last dispatch used is the one that the next will use."""
        self.y.fill_(value)
        if self.out is not None:
            self.out.x.fill_(value)
            self.out.handle.rows.fill_(value)
        self.out = None

    def dispatch(self, x):
        """Rows in the window."""
        self.out = self.buffer.dispatch(x, self._ids, self._weights, layout=self._case.layout)
        return self.out.x

    def expert(self, rows, rank):
        """The experts write where combine reads."""
        return check.expert_output(rows, rank, self.out.handle.rows)

    def combine(self, rows):
        """y of this rank's tokens."""
        weights = self.out.topk_weights if self._case.layout == "expert" else None
        return self.buffer.combine(rows, self.out.handle, topk_weights=weights, out=self.y)

    def plan(self):
        """A whole dispatch, plan and all, with rows of 16 bytes."""
        self.small.dispatch(self._small_x, self._ids, self._weights, layout=self._case.layout)

    def close(self):
        """Give the windows back."""
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
        """In place where the baseline received them."""
        return check.expert_output(rows, rank, rows)


def measure(world, case, *, baselines=(), iters=20, warmup=3, progress=lambda text: None):
    """Measure one case's routing; collective over world, whose size is case.ranks.

    Returns Measured (equal on every rank).
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
    progress("working out what must come back")
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
        floor = Floor(case, world.size)
        for contender in contenders:
            result.times[contender.name] = {op: [] for op in OPS}
            result.wrong[contender.name] = dict.fromkeys(OPS, 0)
        result.hops = {op: [] for op in OPS[:2]}
        result.floor = {op: [] for op in OPS}
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
                rows, dispatched = world.timed(contender.dispatch, x)
                dispatch_stats = subject.buffer.stats()
                wrong_rows = check.count_wrong(rows, table, index)
                rows = contender.expert(rows, rank)
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
            rates = floor.rates(world)
            if keep:
                result.plan.append(planned)
                for op, seconds in floor.seconds(
                    rates,
                    dispatch_stats=result.hops["dispatch"][-1],
                    combine_stats=result.hops["combine"][-1],
                    tokens=tokens,
                    world=world,
                ).items():
                    result.floor[op].append(seconds)
        subject.close()
        comm.barrier()
    result.wrong = {
        name: {op: sum(everyone[op] for everyone in world.allgather(ops)) for op in OPS}
        for name, ops in result.wrong.items()
    }
    result.hops = _summed(result.hops, world)
    return result


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
    """How rows cross between nodes in this run."""
    if comm.num_nodes == 1:
        return "none (one node)"
    if buffer._native.rail_is_mapped():
        return f"{comm.rail}, memory of peers mapped (nodes share this host)"
    return f"{comm.rail}, UCX_TLS={os.environ.get('UCX_TLS', 'all')}"
