"""dispatch, combine, roundtrip: measure and print one case."""

from __future__ import annotations

import os
import sys

from moecomm import InvalidArgument

from . import cases, launch, report
from .measure import OPS, measure
from .world import World, join_gloo


def progress_line(world):
    """Make a function that updates a line of the terminal, on rank 0 and if there is a terminal.

    It writes to the terminal directly, because launchers forward stderr only by whole lines.
    """
    where = os.environ.get("BENCH_PROGRESS") or launch.terminal()
    if world.rank or not where:
        return lambda text: None
    try:
        terminal = open(where, "w")  # noqa: SIM115 (stays open until the process ends)
    except OSError:
        return lambda text: None
    return lambda text: print(f"\r\033[K{text}", end="", file=terminal, flush=True)


def run_cases(world, families, ops, args, *, cold=False):
    """Measure every family; rank 0 prints its rows.

    cold : bool
        Also measure with evicted caches, for `cold` of each record.

    Returns (records of all families, number of wrong elements).
    """
    names, say = cases.baselines_of(args.baseline), progress_line(world)
    records, wrong = [], 0
    for i, family in enumerate(families):

        def progress(text, i=i):
            say(f"[{i + 1}/{len(families)}] {text}")

        measured = measure(
            world,
            family,
            baselines=names,
            iters=args.iters,
            warmup=args.warmup,
            cold=args.cold,
            progress=progress,
        )
        mine = report.of_all_ops(family, measured, ops)
        with_cold_caches = []
        if cold:
            # torch-gloo is slow and never the best baseline.
            best = [name for name in names if name != "torch-gloo"]
            after = measure(
                world,
                family,
                baselines=best,
                iters=max(args.iters // 2, 1),
                warmup=1,
                cold=True,
                progress=progress,
            )
            with_cold_caches = report.of_all_ops(family, after, ops)
            for record, other in zip(mine, with_cold_caches, strict=True):
                record["cold"] = {key: other[key] for key in report.COLD_KEYS}
        records += mine
        say("")
        if world.rank == 0:
            print(report.about(family, mine[0]))
            print("\n".join([report.header(names), *map(report.row, mine)]), flush=True)
            if with_cold_caches:
                print(f"# the same with cold caches, {with_cold_caches[0]['iterations']} iterations")
                print("\n".join([report.header(best), *map(report.row, with_cold_caches)]), flush=True)
        wrong += sum(r["wrong"] + sum(r["baselines_wrong"].values()) for r in [*mine, *with_cold_caches])
    if world.rank == 0:
        report.append(records, json_path=args.json, csv_path=args.csv)
        if args.plot:
            report.plot(args.plot, records)
    return records, wrong


def world_of(ranks):
    """Return the World of the launcher, which must have this number of ranks."""
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
            f"--nodes x --ranks-per-node is {ranks}; expected {world.size}, the ranks that the launcher has started",
            op="bench",
        )
    return world


def arguments(parser):
    """Add the options of the command."""
    cases.arguments(parser)


def main(args):
    """Measure one case and print its rows. The exit status is 1 if a result is wrong."""
    case = cases.from_args(args, args.command)
    if not launch.launched():
        return launch.relaunch(case.ranks, sys.argv[1:])
    _, wrong = run_cases(world_of(case.ranks), [case], OPS if case.op == "roundtrip" else [case.op], args)
    return 1 if wrong else 0
