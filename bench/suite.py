"""The benchmarks of `make bench`: dispatch, combine and round trip of cases.FAMILIES, with warm and cold caches.

All baselines that are available on this machine are measured as well.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from moecomm import options

from . import cases, launch, report, rivals
from .measure import OPS
from .run import run_cases, world_of

# In a checkout, a folder of the sources; else in the current folder.
RESULTS = Path(__file__).parent / "results" if __package__ == "bench" else Path("bench-results")


def arguments(parser):
    """Add the options of the command."""
    cases.measurement(parser)
    # 12 iterations take about three minutes.
    parser.set_defaults(iters=12, baseline="gloo,mpi,rivals")
    parser.add_argument(
        "--tokens", type=options.count, default=0, help="tokens per rank; 0: as in cases.FAMILIES"
    )
    parser.add_argument(
        "--hidden", type=options.count, default=0, help="elements of a token; 0: as in cases.FAMILIES"
    )
    parser.add_argument("--warm-only", action="store_true", help="skip the runs with cold caches")
    parser.add_argument(
        "--output",
        type=options.folder_to_write,
        default=str(RESULTS),
        help="folder for latest.json and latest.png",
    )
    parser.add_argument(
        "--records",
        type=options.file_to_write,
        metavar="FILE",
        help="write the records to this file instead (used by this command itself)",
    )


def main(args):
    """Run all benchmarks; write latest.json and latest.png. The exit status is 1 if a result is wrong."""
    return _measure(args) if launch.launched() else _launch(args)


def _measure(args):
    """Measure and write the results, as one rank."""
    world = world_of(cases.FAMILIES[0].ranks)
    families = [
        cases.replace(f, tokens=args.tokens or f.tokens, hidden=args.hidden or f.hidden)
        for f in cases.FAMILIES
    ]
    records, wrong = run_cases(world, families, OPS, args, cold=not args.warm_only)
    if world.rank == 0:
        if args.records:
            Path(args.records).write_text(json.dumps(records))
        else:
            _write(args, records)
    return 1 if wrong else 0


def _launch(args):
    """Start the ranks under Open MPI, and again under Intel MPI for the baselines that need it."""
    ranks = cases.FAMILIES[0].ranks
    words = [
        "suite",
        "--warmup",
        str(args.warmup),
        "--tokens",
        str(args.tokens),
        "--hidden",
        str(args.hidden),
    ]
    words += ["--cold"] * args.cold + ["--warm-only"] * args.warm_only
    wanted = args.baseline.split(",")
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first.json", Path(folder) / "second.json"
        here = ",".join(name for name in wanted if name != "rivals") or "none"
        more = ["--iters", str(args.iters), "--baseline", here, "--records", str(first)]
        status = launch.relaunch(ranks, [*words, *more])
        if not first.exists():
            return status or 1
        records = json.loads(first.read_text())
        if "rivals" in wanted:
            reason = rivals.why_not()
            if reason:
                print(f"# skipped: {' and '.join(rivals.NAMES)}: {reason}")
            else:
                print("# moecomm and the baselines that need Intel MPI, under its launcher:", flush=True)
                more = ["--iters", str(max(args.iters // 2, 1)), "--baseline", "rivals"]
                failed = rivals.relaunch(ranks, [*words, *more, "--records", str(second)])
                if second.exists():
                    report.merge(records, json.loads(second.read_text()))
                else:
                    print(f"# {' and '.join(rivals.NAMES)} FAILED with status {failed}")
                status = status or failed
    _write(args, records)
    report.append(records, json_path=args.json, csv_path=args.csv)
    if args.plot:
        report.plot(args.plot, records)
    return status


def _write(args, records):
    folder = Path(args.output)
    report.write_latest(folder / "latest.json", records)
    report.plot(folder / "latest.png", records)
    print("\n".join(map(report.headline, records)))
    print(f"# written: {folder / 'latest.json'}, {folder / 'latest.png'}")
    wrong = sum(
        r["wrong"] + sum(r["baselines_wrong"].values()) + (r["cold"]["wrong"] if r["cold"] else 0)
        for r in records
    )
    print(f"# {'all results are correct' if not wrong else f'{wrong} ELEMENTS ARE WRONG'}")
