"""dispatch, combine, roundtrip: one case, measured and printed."""

from __future__ import annotations

import os
import sys

from moecomm import InvalidArgument

from . import cases, launch, report
from .measure import OPS, measure
from .world import World, join_gloo


def progress_line(world):
    """A function that keeps one line of the terminal current, on rank 0 where there is a terminal.

    Written to the terminal itself: a launcher passes stderr on by whole lines only.
    """
    where = os.environ.get("BENCH_PROGRESS") or launch.terminal()
    if world.rank or not where:
        return lambda text: None
    try:
        terminal = open(where, "w")  # noqa: SIM115 (open as long as the process)
    except OSError:
        return lambda text: None
    return lambda text: print(f"\r\033[K{text}", end="", file=terminal, flush=True)


def run_cases(world, families, ops, args):
    """Measure every family and print its rows (rank 0).

    Returns the records of all, and how many elements were wrong.
    """
    names, say = cases.baselines_of(args.baseline), progress_line(world)
    records = []
    for i, family in enumerate(families):

        def progress(text, i=i):
            say(f"[{i + 1}/{len(families)}] {text}")

        measured = measure(
            world, family, baselines=names, iters=args.iters, warmup=args.warmup, progress=progress
        )
        mine = report.of_all_ops(family, measured, ops)
        records += mine
        say("")
        if world.rank == 0:
            print(
                "\n".join([report.about(family, mine[0]), report.header(names), *map(report.row, mine)]),
                flush=True,
            )
    wrong = sum(r["wrong"] + sum(r["baselines_wrong"].values()) for r in records)
    if world.rank == 0:
        report.append(records, json_path=args.json, csv_path=args.csv)
        if args.plot:
            report.plot(args.plot, records)
    return records, wrong


def world_of(ranks):
    """The launcher's world, which must have that many ranks."""
    if "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ:
        from mpi4py import MPI

        world = World.from_mpi(MPI.COMM_WORLD)
    else:
        import torch.distributed as dist

        if not dist.is_initialized():
            join_gloo()
        world = World.from_torch()
    if world.size != ranks:
        raise InvalidArgument(
            f"--nodes x --ranks-per-node: got {ranks}; the launcher has started {world.size} ranks",
            op="bench",
        )
    return world


def arguments(parser):
    """The options of a case and of its measurement."""
    cases.arguments(parser)


def main(args):
    """Measure one case and print its row; for a round trip also the rows of its two halves. 1 where a
    result was wrong.
    """
    case = cases.from_args(args, args.command)
    if not launch.launched():
        return launch.relaunch(case.ranks, sys.argv[1:])
    _, wrong = run_cases(world_of(case.ranks), [case], OPS if case.op == "roundtrip" else [case.op], args)
    return 1 if wrong else 0
