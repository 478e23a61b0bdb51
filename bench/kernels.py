"""Time per row of every variant of the CPU row kernels, and the variants that moecomm uses.

moecomm makes the same measurement for at most 30 ms when it first moves rows (csrc/fabric/cpu/rows_choice.hpp). This
command measures longer, so it also shows the quality of that choice.
"""

import json
import time

from moecomm import options
from moecomm._native import core


def arguments(parser):
    """Add the options of the command."""
    parser.add_argument(
        "--seconds", type=options.above_zero, default=1.0, help="duration of the measurement (default: 1)"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=options.file_to_write, help="also write the results to this file"
    )


def main(args):
    """Print the table; return the exit status."""
    build, few, many, reason, cpu, _ = core.row_kernel_choice()
    times = core.time_row_kernels(args.seconds)
    usable = [t for t in times if not t[0].startswith("base/")] or times
    best = min(t[1] for t in usable), min(t[2] for t in usable)
    print(f"{cpu}: rows of 7168 bf16 elements, nanoseconds per row read\n")
    print(f"{'variant':<16}{'2 terms':>10}{'8 terms':>10}")
    for name, of_few, of_many in times:
        used = [word for word, chosen in (("2 terms", few), ("8 terms", many)) if chosen == name]
        print(
            f"{name:<16}{of_few:>10.0f}{of_many:>10.0f}{'   used for ' + ' and '.join(used) if used else ''}"
        )
    found = {t[0]: t[1:] for t in times}
    slower = found[few][0] / best[0], found[many][1] / best[1]
    print(
        f"\nused: {few} and {many} ({reason}); {slower[0]:.2f} and {slower[1]:.2f} times the time of the best variant"
    )
    if args.json:
        result = {
            "cpu": cpu,
            "date": time.strftime("%Y-%m-%d"),
            "build": build,
            "few": few,
            "many": many,
            "reason": reason,
            "ns_per_row": {name: {"few": a, "many": b} for name, a, b in times},
            "slower_than_best": {"few": slower[0], "many": slower[1]},
        }
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    return 0
