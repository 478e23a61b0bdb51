"""decode: microseconds per step against tokens per rank, also for the send and receive phases.

A step is dispatch and combine. The output of the experts is ready in the memory of both epochs. Contenders alternate
in blocks of consecutive steps, which synchronize themselves. The time of a step is the mean over ranks, that of a
contender the median over all steps.

    decode       decode_dispatch and decode_combine, each with both phases in one call; hooks: with separate phases
    weighted     the weights travel with the tokens: one answer per token and rank instead of one per pick
    throughput   Buffer.dispatch and Buffer.combine, expert layout
    tuned-mpi    the same rows by MPI_Alltoallv, with packing and sums of moecomm; its routing is not timed
                 (tuned-gloo: over gloo)
    floor        only the copies, puts, flags and sums of the decode path, in C++, with addresses computed before

Before a block all outputs are overwritten; after it all results are checked.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch

import moecomm
from moecomm import InvalidArgument, options
from moecomm._native import core
from moecomm.errors import raise_failure

from . import baselines, check, launch
from .cases import Case
from .decode_table import table
from .routing import make_inputs
from .run import world_of

_PARTS = ("dispatch send", "dispatch receive", "combine send", "combine receive")


def arguments(parser):
    """Add the options of the command."""
    add = parser.add_argument
    add(
        "--geometries",
        type=options.geometries,
        default="1x8,2x4",
        help="list of NODESxRANKS_PER_NODE, all with the same number of ranks",
    )
    add("--tokens", type=options.positives, default="1,8,32,128", help="tokens per rank")
    add("--hidden", type=options.tokens, default=7168, help="elements of a token")
    add(
        "--experts",
        type=options.ranks,
        default=288,
        help="experts over all ranks; default: 256 + 32 redundant",
    )
    add("--top-k", type=options.ranks, default=8, help="picks per token")
    add(
        "--baseline",
        type=options.some_of("mpi", "gloo", "none"),
        default="gloo,mpi",
        help="comma-separated list of mpi, gloo, none",
    )
    add("--blocks", type=options.positive, default=5, help="blocks of each contender")
    add(
        "--steps",
        type=options.count,
        default=0,
        help="steps per block; 0: 10 to 200, for about 2000 tokens",
    )
    add("--json", type=options.file_to_write, metavar="FILE", help="append one JSON object per row")


def main(args):
    """Measure all cases and print their rows. The exit status is 1 if a result is wrong."""
    geometries = [tuple(map(int, g.split("x"))) for g in args.geometries.split(",")]
    ranks = geometries[0][0] * geometries[0][1]
    if any(n * p != ranks for n, p in geometries):
        raise InvalidArgument(
            f"--geometries is {args.geometries}; expected geometries with the same number of ranks",
            op="bench",
        )
    if not launch.launched():
        return launch.relaunch(ranks, sys.argv[1:])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    world, wrong = world_of(ranks), 0
    for nodes, per_node in geometries:
        for tokens in map(int, args.tokens.split(",")):
            case = replace(
                Case(),
                nodes=nodes,
                ranks_per_node=per_node,
                tokens=tokens,
                hidden=args.hidden,
                experts=args.experts,
                top_k=args.top_k,
                layout="expert",
            )
            record = measure(world, case, args)
            wrong += sum(c["wrong"] for c in record["contenders"].values())
            if world.rank == 0:
                print("\n".join(table(record)), flush=True)
                if args.json:
                    with open(args.json, "a") as file:
                        print(json.dumps(record), file=file)
    return 1 if wrong else 0


@dataclass
class Routed:
    """Inputs of one block, and the expected results."""

    x: torch.Tensor
    ids: list  # by rank
    weights: list
    source: torch.Tensor  # source rank and token of each received row, in packed order
    token: torch.Tensor
    expert_rows: torch.Tensor = field(repr=False)  # output of the experts
    y: torch.Tensor = field(repr=False)


def _route(world, case, seed):
    own = make_inputs(case, world.rank, seed=seed)
    xs, ids, weights = zip(*world.allgather((own.x, own.ids, own.weights)), strict=True)
    source, token = check.received_order(ids, world.rank, num_experts=case.experts, layout="expert")
    table = torch.stack(xs)
    return Routed(
        own.x,
        ids,
        weights,
        source,
        token,
        check.expert_output(table[source, token], world.rank, None),
        torch.empty_like(own.x),
    ), table


def _sum(case, routed, rank, rounded_by_rank):
    """Expected y: summed by ascending k or, if weights travel, as rounded sums of ranks in the order of first picks."""
    x, ids, weights = routed.x, routed.ids[rank], routed.weights[rank]
    owner = torch.where(ids < 0, -1, ids // (case.experts // case.ranks))
    total, done = torch.zeros(x.shape), torch.zeros(len(x), 1, dtype=torch.bool)
    terms = [
        (
            (x.float() * ((owner[:, k, None] + 1) / 4)).to(x.dtype).float() * weights[:, k, None],
            owner[:, k] >= 0,
        )
        for k in range(case.top_k)
    ]
    for k in range(case.top_k):
        part, there = terms[k]
        if rounded_by_rank:
            # The first pick of a rank has the sum of all its picks.
            there = there & ~(owner[:, :k] == owner[:, k, None]).any(1)
            for j in range(k + 1, case.top_k):
                part = torch.where((owner[:, j] == owner[:, k])[:, None], part + terms[j][0], part)
            part = part.to(x.dtype).float()
        total = torch.where(there[:, None], torch.where(done, total + part, part), total)
        done |= there[:, None]
    return total.to(x.dtype)


class DecodePath:
    """The decode path as a contender."""

    def __init__(self, buffer, case, rank, *, hooks=False, weighted=False):
        self._buffer, self._case, self._rank, self._hooks, self._weighted = (
            buffer,
            case,
            rank,
            hooks,
            weighted,
        )
        self.parts = []

    def _dispatch(self):
        r = self._routed
        return self._buffer.decode_dispatch(
            r.x,
            r.ids[self._rank],
            topk_weights=r.weights[self._rank] if self._weighted else None,
            quant=None,
            return_hook=self._hooks,
        )

    def _combine(self, recv):
        r = self._routed
        return self._buffer.decode_combine(
            recv.handle.rows,
            r.ids[self._rank],
            None if self._weighted else r.weights[self._rank],
            recv.handle,
            out=r.y,
            return_hook=self._hooks,
        )

    def begin(self, routed):
        """Write the experts' output of both epochs, and overwrite x and y."""
        self._routed, self._seen = routed, []
        for _ in range(2):
            recv, hook = self._dispatch()
            if hook:
                hook()
            packed = _packed(recv)
            recv.handle.rows[packed] = routed.expert_rows
            recv.x[packed] = float("nan")
            self._seen.append((recv.x, packed))
            hook = self._combine(recv)[1]
            if hook:
                hook()
        routed.y.fill_(float("nan"))

    def step(self):
        """Run dispatch and combine."""
        if not self._hooks:
            self._combine(self._dispatch()[0])
            return
        times = [time.perf_counter()]
        recv, hook = self._dispatch()
        times.append(time.perf_counter())
        hook()
        times.append(time.perf_counter())
        hook = self._combine(recv)[1]
        times.append(time.perf_counter())
        hook()
        times.append(time.perf_counter())
        self.parts.append(np.diff(times))

    def end(self, table):
        """Number of wrong elements in the results of the block."""
        r = self._routed
        wrong = sum(
            check.count_wrong(x[packed].contiguous(), table[r.source, r.token]) for x, packed in self._seen
        )
        return wrong + check.count_wrong(r.y, _sum(self._case, r, self._rank, self._weighted))


def _packed(recv):
    """Indices [2, N] of the received rows, as a tuple."""
    rows = torch.arange(recv.x.shape[1])
    return (rows[None, :] < recv.counts[:, None]).nonzero(as_tuple=True)


class Floor:
    """Only the traffic of the decode path."""

    def __init__(self, path):
        self._path, self._y = path, None

    def begin(self, routed):
        """Prepare to repeat a step."""
        self._path.begin(routed)
        self._routed, self._y = routed, torch.full_like(routed.y, float("nan"))
        self._floor = core.DecodeFloor(self._path._buffer.backend.memory.decode.native, routed.x, self._y)

    def _require(self, failure):
        if failure is not None:
            raise_failure(failure, op="decode_floor", rank=self._path._rank)

    def step(self):
        """Run one step."""
        self._require(self._floor.run(1))

    def end(self, table):
        """Number of wrong elements of y."""
        return check.count_wrong(self._y, _sum(self._path._case, self._routed, self._path._rank, False))

    def run(self, steps):
        """Run several steps in one native call."""
        self._require(self._floor.run(steps))

    def latency(self, rounds):
        """One-way latency of a put with its flag, between the first and the last rank, in seconds."""
        start = time.perf_counter()
        self._require(self._floor.latency(rounds))
        return (time.perf_counter() - start) / rounds / 2


class Alternative:
    """The throughput path, or a baseline. Its steps are not checked, but one further step is."""

    def __init__(self, case, rank, dispatch, combine, prepare, group_of, rounded):
        self._case, self._rank, self._dispatch, self._combine, self._prepare = (
            case,
            rank,
            dispatch,
            combine,
            prepare,
        )
        self._sums = dict(
            group_of=group_of, rounded=rounded, num_experts=case.experts, size=case.ranks, layout="expert"
        )

    def begin(self, routed):
        """Compute the routes. Not timed."""
        self._routed = routed
        self._prepare(routed)

    def step(self):
        """Run dispatch and combine."""
        self._combine(self._dispatch(self._routed.x))

    def end(self, table):
        """Number of wrong elements of a step with experts."""
        r = self._routed
        rows = self._dispatch(r.x)
        wrong = check.count_wrong(rows, table[r.source, r.token])
        y = self._combine(check.expert_output(rows, self._rank, rows))
        return wrong + check.count_wrong(
            y, check.combined(r.x, r.ids[self._rank], r.weights[self._rank], **self._sums)
        )


def _throughput(comm, case, rank):
    buffer = moecomm.Buffer(
        comm, hidden=case.hidden, num_experts=case.experts, top_k=case.top_k, max_tokens=case.tokens
    )
    y = torch.empty((case.tokens, case.hidden), dtype=torch.bfloat16)
    state = {}

    def prepare(routed):
        state["routed"] = routed

    def dispatch(x):
        state["out"] = buffer.dispatch(x, state["routed"].ids[rank], state["routed"].weights[rank])
        return state["out"].x

    def combine(rows):
        return buffer.combine(rows, state["out"].handle, topk_weights=state["out"].topk_weights, out=y)

    node_of = [r // case.ranks_per_node for r in range(case.ranks)]
    return Alternative(
        case, rank, dispatch, combine, prepare, node_of, [n != node_of[rank] for n in range(case.nodes)]
    )


def _baseline(name, world, case):
    inner = baselines.make(name, world, case)
    return Alternative(
        case,
        world.rank,
        inner.dispatch,
        inner.combine,
        lambda routed: inner.prepare(baselines.Routes(case, world.rank, routed.ids, routed.weights)),
        list(range(case.ranks)),
        [True] * case.ranks,
    )


def measure(world, case, args):
    """Measure a case; return its record, equal on all ranks.

    It has times, wrong elements, and the bytes of a step over all ranks.
    """
    steps = args.steps or min(200, max(10, 2000 // case.tokens))
    names = [n for key in ("mpi", "gloo") if key in args.baseline.split(",") for n in (f"tuned-{key}",)]
    with moecomm.Communicator(world.group, ranks_per_node=case.ranks_per_node) as comm:
        buffer = moecomm.Buffer(
            comm,
            hidden=case.hidden,
            num_experts=case.experts,
            top_k=case.top_k,
            max_tokens=case.tokens,
            decode=True,
            arena_bytes=1 << 16,
        )
        contenders = {
            "decode": DecodePath(buffer, case, world.rank),
            "hooks": DecodePath(buffer, case, world.rank, hooks=True),
            "weighted": DecodePath(buffer, case, world.rank, weighted=True),
            "floor": Floor(DecodePath(buffer, case, world.rank)),
            "throughput": _throughput(comm, case, world.rank),
            **{name: _baseline(name, world, case) for name in names},
        }
        times, wrong, latencies, traffic = {n: [] for n in contenders}, dict.fromkeys(contenders, 0), [], {}
        for block in range(args.blocks + 1):  # the first block is a warmup
            routed, table = _route(world, case, seed=block)
            for turn in range(len(contenders)):
                name = list(contenders)[(block + turn) % len(contenders)]
                contender = contenders[name]
                contender.begin(routed)
                buffer.stats()
                world.barrier()
                seconds = []
                if name == "floor":
                    start = time.perf_counter()
                    contender.run(steps)
                    seconds = [(time.perf_counter() - start) / steps]
                    latencies.append(contender.latency(50))
                else:
                    for _ in range(steps):
                        start = time.perf_counter()
                        contender.step()
                        seconds.append(time.perf_counter() - start)
                if name in ("decode", "weighted"):
                    traffic[name] = buffer.stats()["decode"]
                world.barrier()
                wrong[name] += contender.end(table)
                if block:
                    times[name] += np.mean(world.allgather(seconds), axis=0).tolist()
                world.barrier()
        buffer.close()
        comm.barrier()
    parts = np.median(np.mean(world.allgather(np.array(contenders["hooks"].parts[steps:])), axis=0), axis=0)
    found = {
        name: {
            "median_us": _us(np.median(t)),
            "p99_us": _us(np.percentile(t, 99)),
            "wrong": sum(world.allgather(wrong[name])),
        }
        for name, t in times.items()
    }
    return {
        "nodes": case.nodes,
        "ranks": case.ranks,
        "tokens": case.tokens,
        "hidden": case.hidden,
        "experts": case.experts,
        "top_k": case.top_k,
        "steps": steps * args.blocks,
        "contenders": found,
        "parts_us": dict(zip(_PARTS, map(_us, parts), strict=True)),
        "put_us": _us(np.median(world.allgather(latencies)[0])),
        "bytes": {name: _summed(world, t, steps) for name, t in traffic.items()},
    }


def _us(seconds):
    return round(1e6 * float(seconds), 2)


def _summed(world, counters, steps):
    everyone = world.allgather(counters)
    return {
        hop: {
            kind: round(sum(c[hop][f"{kind}_bytes"] for c in everyone) / steps)
            for kind in ("logical", "physical")
        }
        for hop in ("rail", "node")
    }
