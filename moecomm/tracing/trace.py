"""Timelines of roles as Chrome/Perfetto JSON: one process per rank, one track per role and channel.

The sim world (virtual time) and the cpu world (real time) use the same names, so their timelines can be compared in
ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
import argparse

import contextlib
import json
from dataclasses import dataclass

from .. import options
from .._native import core
from ..checks import require

MOST_TOKENS = 1 << 20  # over all ranks
ROLES = core.ROLES  # tracks from top to bottom


@dataclass(frozen=True)
class Span:
    """A time span of a role: rank, role, channel (-1: none), name, begin and end in us."""

    rank: int
    role: str
    channel: int
    name: str
    begin: float
    end: float


@contextlib.contextmanager
def recording(cluster: Any) -> Iterator[Any]:
    """Context in which a sim.Cluster logs its roles. spans_of_cluster() reads the log; reset() clears it."""
    cluster.native.set_log(True)
    try:
        yield cluster
    finally:
        cluster.native.set_log(False)


def spans_of_cluster(cluster: Any) -> Any:
    """Spans of a sim.Cluster: every role and, inside it, its waits. A wait is named after its peer and phase."""
    spans = []
    for line in cluster.native.log():
        if line["did"] == "role" and line["role"] != "rank":
            name = line["role"]
        elif line["did"] in ("wait", "give_up"):
            name = f"wait for rank {line['peer']} ({line['phase']})"
        else:
            continue
        spans.append(
            Span(line["rank"], line["role"], line["channel"], name, line["begin"] / 1e6, line["end"] / 1e6)
        )
    return spans


def spans_of_buffers(trace: Any, rank: Any = 0) -> Any:
    """Spans of this rank's buffers, from an overlap.Trace. The cpu world runs the channels of a role sequentially."""
    return [
        Span(rank, role, -1, role, begin * 1e6, end * 1e6) for _, role, begin, end in trace.spans("roles")
    ]


def save(path: Any, spans: Any) -> None:
    """Write spans as Chrome/Perfetto JSON. Time starts at the first span."""
    start = min((s.begin for s in spans), default=0.0)
    tracks = sorted(
        {(s.rank, s.role, s.channel) for s in spans},
        key=lambda t: (t[0], ROLES.index(t[1]) if t[1] in ROLES else len(ROLES), t[2]),
    )
    number = {track: i for i, track in enumerate(tracks)}
    events = [
        {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}
        for rank in sorted({s.rank for s in spans})
    ]
    for (rank, role, channel), i in number.items():
        track = role if channel < 0 else f"{role} {channel}"
        events += [
            {"ph": "M", "pid": rank, "tid": i, "name": "thread_name", "args": {"name": track}},
            {"ph": "M", "pid": rank, "tid": i, "name": "thread_sort_index", "args": {"sort_index": i}},
        ]
    for s in spans:
        events.append(
            {
                "ph": "X",
                "pid": s.rank,
                "tid": number[s.rank, s.role, s.channel],
                "name": s.name,
                "cat": s.role,
                "ts": s.begin - start,
                "dur": s.end - s.begin,
            }
        )
    with open(path, "w") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ns"}, file)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("out", type=options.file_to_write, help="file to write, .json")
    parser.add_argument("--world", choices=("sim", "cpu"), default="sim", help="where to run")
    parser.add_argument(
        "--cluster", default="h800", help="in the sim world: name in moecomm.clusters, or a .toml file"
    )
    parser.add_argument("--ranks", type=options.ranks, default=16, help="number of ranks")
    parser.add_argument("--ranks-per-node", type=options.ranks, default=8, help="ranks per node")
    parser.add_argument("--model", default="deepseek_v3", help="name of a shape in moecomm.presets")
    parser.add_argument("--tokens", type=options.tokens, default=64, help="tokens per rank")
    parser.add_argument("--decode", action="store_true", help="trace the decode path")


def main(args: argparse.Namespace) -> None:
    """Trace one dispatch and combine with uniform routing."""
    import torch

    from ..sim import clusters

    from .. import local, presets, sim

    from ..nn import overlap
    from ..buffer import Buffer

    model = presets.shape_of(args.model)
    require(
        args.ranks * args.tokens <= MOST_TOKENS,
        "trace",
        "--ranks times --tokens",
        args.ranks * args.tokens,
        f"at most {MOST_TOKENS}",
    )
    require(
        args.world == "sim" or args.ranks <= local.MOST_RANKS,
        "trace",
        "--ranks",
        args.ranks,
        f"at most {local.MOST_RANKS} in the cpu world",
    )
    require(
        args.ranks % args.ranks_per_node == 0,
        "trace",
        "--ranks-per-node",
        args.ranks_per_node,
        f"a divisor of the {args.ranks} ranks",
    )
    shape = {
        "hidden": model.hidden,
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "max_tokens": args.tokens,
    }
    g = torch.Generator().manual_seed(0)
    ids = [
        torch.rand((args.tokens, model.num_experts), generator=g, dtype=torch.float32, device="cpu")
        .argsort(1)[:, : model.top_k]
        .contiguous()
        for _ in range(args.ranks)
    ]
    if args.world == "sim":
        cluster = sim.Cluster(
            args.ranks,
            ranks_per_node=args.ranks_per_node,
            hardware=clusters.load(args.cluster).hardware,
            decode=args.decode,
            **shape,
        )
        with recording(cluster):
            (cluster.decode_step if args.decode else cluster.step)(ids)
            spans = spans_of_cluster(cluster)
    else:

        def run(comm: Any) -> Any:
            buf = Buffer(comm, **shape)
            with overlap.Trace(buf) as trace:
                x = torch.randn((args.tokens, model.hidden), dtype=torch.float32, device="cpu").to(
                    torch.bfloat16
                )
                if args.decode:
                    received, _ = buf.decode_dispatch(x, ids[comm.rank], return_hook=False)
                    buf.decode_combine(
                        received.handle.rows, ids[comm.rank], None, received.handle, return_hook=False
                    )
                else:
                    out = buf.dispatch(x, ids[comm.rank])
                    buf.combine(out.handle.rows, out.handle)
                return spans_of_buffers(trace, comm.rank)

        spans = [
            s for one in local.run_local(run, args.ranks, ranks_per_node=args.ranks_per_node) for s in one
        ]
    save(args.out, spans)
    print(f"{args.out}: {len(spans)} spans of {args.ranks} ranks; open it in https://ui.perfetto.dev")
