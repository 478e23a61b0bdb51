"""Scaling: time per row against the number of tokens with all ranks, and against ranks with few and many tokens.

A row is one that dispatch delivers to a rank and combine reads there. With top-k over R ranks a token has about R (1
- (1 - 1/R)^k) rows. So the time per *token* grows with the ranks, while the time per row should not. Reading x and
writing y are traffic per token: its share per row is larger if a token has fewer rows ("floor/row").
"""

from __future__ import annotations

import sys
import time

from moecomm import options

from . import cases, launch, report
from .measure import OPS, OWN, measure
from .run import progress_line, world_of
from .world import World


def arguments(parser):
    """Add the options of the command."""
    cases.arguments(parser, cases.Case())
    parser.add_argument(
        "--sweep-tokens",
        type=options.positives,
        default="256,512,1024,2048,4096",
        help="numbers of tokens per rank",
    )
    parser.add_argument(
        "--sweep-ranks",
        type=options.positives,
        default="2,4,8",
        help="numbers of ranks; only with one node",
    )


def main(args):
    """Print one line per size. The exit status is 1 if a result is wrong."""
    case = cases.from_args(args, "roundtrip")
    if not launch.launched():
        return launch.relaunch(case.ranks, sys.argv[1:])
    everyone = world_of(case.ranks)
    say = progress_line(everyone)
    tokens = [int(t) for t in args.sweep_tokens.split(",")]
    sizes = [(case.ranks, t) for t in tokens]
    if case.nodes == 1:
        sizes += [
            (r, t)
            for r in map(int, args.sweep_ranks.split(","))
            if r < case.ranks
            for t in (tokens[0], tokens[-1])
        ]
    records = []
    if everyone.rank == 0:
        print(
            f"# {case.title()}\n# {'ranks':>6} {'tokens':>7} {'dispatch us':>12} {'combine us':>12} "
            f"{'roundtrip us':>13} {'rows':>8} {'ns/row':>8} "
            f"{'floor/row':>10} {'plan us':>9} {'plan %':>7} {'#wrong':>7}",
            flush=True,
        )
    for ranks, count in sizes:
        now = cases.replace(
            case, tokens=count, ranks_per_node=ranks // case.nodes, experts=case.experts // case.ranks * ranks
        )
        world = part_of(everyone, ranks)
        if world is not None:
            measured = measure(
                world,
                now,
                baselines=(),
                iters=args.iters,
                warmup=args.warmup,
                progress=lambda text, ranks=ranks, count=count: say(f"{ranks} ranks, {count} tokens: {text}"),
            )
            records += report.of_all_ops(now, measured, OPS)
            if world.rank == 0:
                say("")
                print(line(now, measured), flush=True)
        rest(everyone)
    if everyone.rank == 0:
        report.append(records, json_path=args.json, csv_path=args.csv)
        if args.plot:
            report.plot(args.plot, records)
    return 1 if any(r["wrong"] for r in records) else 0


def line(case, measured):
    """Format the results of one size. A row is counted once for both verbs."""
    dispatch, combine, both = (measured.median(OWN, op) for op in OPS)
    rows = measured.hops["dispatch"]["node"]["logical_rows"]
    plan = report.record(case, measured)["plan_us"]
    floor = report.record(case, measured)["floor_fraction"] * both
    wrong = measured.wrong[OWN]["roundtrip"]
    return (
        f"  {case.ranks:6d} {case.tokens:7d} {dispatch:12.0f} {combine:12.0f} {both:13.0f} {rows:8.0f} "
        f"{1e3 * both / rows:8.1f} "
        f"{1e3 * floor / rows:10.1f} {plan:9.0f} {100 * plan / both:7.2f} {wrong:7d}"
    )


def part_of(everyone, ranks):
    """Make a World of the first ranks; None on other ranks."""
    if ranks == everyone.size:
        return everyone
    part = everyone.group.Split(0 if everyone.rank < ranks else 1, everyone.rank)
    return World.from_mpi(part) if everyone.rank < ranks else None


def rest(everyone):
    """Barrier at which waiting ranks sleep, so that they do not use cores."""
    request = everyone.group.Ibarrier()
    while not request.Test():
        time.sleep(0.02)
