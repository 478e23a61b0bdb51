"""What `make bench` runs: the two families of cases.FAMILIES, each as dispatch, combine and round trip."""

from __future__ import annotations

import sys
from pathlib import Path

from moecomm import options

from . import cases, launch, report
from .measure import OPS
from .run import run_cases, world_of

# Beside the sources in a checkout, in the current folder where the package is installed.
RESULTS = Path(__file__).parent / "results" if __package__ == "bench" else Path("bench-results")


def arguments(parser):
    """The measurement's options, and sizes for a quick look."""
    cases.measurement(parser)
    parser.set_defaults(iters=12)  # three minutes are also enough on a machine that has other things to do
    parser.add_argument("--tokens", type=options.count, default=0, help="per rank; 0: as the families say")
    parser.add_argument("--hidden", type=options.count, default=0, help="0: as the families say")
    parser.add_argument(
        "--output",
        type=options.folder_to_write,
        default=str(RESULTS),
        help="folder of latest.json and latest.png",
    )


def main(args):
    """Run all under one mpirun, write latest.json and latest.png. 1 where a result was wrong."""
    ranks = cases.FAMILIES[0].ranks
    if not launch.launched():
        return launch.relaunch(ranks, sys.argv[1:])
    families = [
        cases.replace(f, tokens=args.tokens or f.tokens, hidden=args.hidden or f.hidden)
        for f in cases.FAMILIES
    ]
    world = world_of(ranks)
    records, wrong = run_cases(world, families, OPS, args)
    if world.rank == 0:
        folder = Path(args.output)
        report.write_latest(folder / "latest.json", records)
        report.plot(folder / "latest.png", records)
        print(f"# written: {folder / 'latest.json'}, {folder / 'latest.png'}")
        print(f"# {'every result was right' if not wrong else f'{wrong} ELEMENTS WERE WRONG'}")
    return 1 if wrong else 0
