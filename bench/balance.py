"""`python -m bench balance`: quality, time and moves of placements and splits, against a greedy algorithm and bounds.

Balancedness is mean / max rank load, averaged over layers and seeds. Times are the best of several runs of the native
code, for 58 layers on one thread.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np

from moecomm import options

from . import balance_baseline as base
from . import balance_step
from .balance_batch import case_batch
from .balance_rows import (
    HEADER,
    KINDS,
    STEPS,
    Row,
    asked_for,
    greedy_plan,
    over_seeds,
    plan,
)
from .balance_split import case_activate, case_split


def arguments(parser):
    """Add the options of the command."""
    parser.add_argument(
        "--cases",
        type=options.some_of("A", "B", "C", "D", "split", "activate", "batch", "step"),
        default="A,B,C,D,split,activate,batch,step",
        help="comma-separated list of A, B, C, D, split, activate, batch, step",
    )
    parser.add_argument(
        "--loads",
        type=options.some_of(*KINDS),
        default=",".join(KINDS),
        help="comma-separated list of loads (recorded: real text through gates that are trained first)",
    )
    parser.add_argument("--seeds", type=options.positive, default=3, help="number of seeds")
    parser.add_argument("--repeats", type=options.positive, default=5, help="runs per measured time")
    parser.add_argument(
        "--exact-layers",
        type=options.count,
        default=2,
        help="layers per seed that are also solved by integer programs (case C) and linear programs (activate)",
    )
    parser.add_argument(
        "--json", type=options.file_to_write, help="append the rows to this file, one JSON object per line"
    )


def main(args):
    """Print the table, and write JSON lines if requested."""
    runs = dict(
        A=case_a,
        B=case_b,
        C=case_c,
        D=case_d,
        split=case_split,
        activate=case_activate,
        batch=case_batch,
        step=balance_step.run,
    )
    wanted = args.cases.split(",")
    print(HEADER)
    judged, missed = 0, []
    for case in wanted:
        for row in runs[case](args):
            row = Row(**row) if isinstance(row, dict) else row
            print(row.text(), flush=True)
            judged += row.missed() is not None
            missed += [f"{row.case} {row.load}"] if row.missed() else []
            if args.json:
                with open(args.json, "a") as f:
                    f.write(json.dumps(asdict(row)) + "\n")
    print(
        f"# {judged - len(missed)} of {judged} rows with targets reach them"
        + (f"; missed: {'; '.join(missed)}" if missed else "")
    )


def case_a(args):
    """32 ranks in 4 nodes, 288 slots; each group stays in one node."""
    shape = (288, 8, 4, 32)
    for kind, make in asked_for(args, KINDS):

        def measure(seed):
            load = make(seed)
            table, ms = plan(load, *shape, args.repeats)
            greedy, greedy_ms = greedy_plan(load, *shape)
            return (
                base.balancedness(load, table, 32),
                base.balancedness(load, greedy, 32),
                base.pairing_bound(load, 4),
                ms,
                greedy_ms,
            )

        got, greedy, bound, ms, greedy_ms = over_seeds(args, measure)
        target = {"zipf": 0.755, "recorded": None}.get(kind, 0.999 * bound)
        yield Row(
            "A",
            kind,
            got,
            greedy,
            bound,
            target,
            ms,
            15 if kind == "zipf" else 10,
            note=f"greedy: {greedy_ms:.0f} ms",
        )


def case_b(args):
    """32 ranks, 288 slots, no groups; then few moves on a drift step."""
    shape = (288, 1, 1, 32)
    for kind, make in asked_for(args, KINDS):

        def measure(seed):
            load = make(seed)
            table, ms = plan(load, *shape, args.repeats)
            greedy, greedy_ms = greedy_plan(load, *shape)
            return base.balancedness(load, table, 32), base.balancedness(load, greedy, 32), ms, greedy_ms

        got, greedy, ms, greedy_ms = over_seeds(args, measure)
        yield Row(
            "B",
            kind,
            got,
            greedy,
            1.0,
            None if kind == "recorded" else 0.999,
            ms,
            5,
            note=f"greedy: {greedy_ms:.0f} ms",
        )
    for kind, step in asked_for(args, STEPS):
        for moves, target in ((1, 0.98), (2, 0.995)):

            def measure(seed):
                load, later = step(seed)
                old, _ = plan(load, *shape, 1)
                table, ms = plan(later, *shape, args.repeats, old, max_moves=moves)
                changed, anew = (
                    (t != old).reshape(len(load), 32, -1).sum(2)
                    for t in (table, base.plain_greedy(later, *shape))
                )
                return (
                    base.balancedness(later, table, 32),
                    base.balancedness(later, old, 32),
                    ms,
                    changed.max(),
                    changed.mean(),
                    anew.mean(),
                )

            got, stale, ms, most, mean, anew = over_seeds(args, measure)
            yield Row(
                "B moves",
                f"{kind}, <= {moves}",
                got,
                stale,
                1.0,
                target if kind == "drift" else None,
                ms,
                70,
                most,
                moves,
                f"slots of a rank at most, {mean:.2f} on average; greedy: the old placement (a new greedy one would "
                f"move {anew:.1f})",
            )


def case_c(args):
    """144 ranks, 288 slots: the numbers of replicas matter, and the pairs of experts per rank."""
    shape = (288, 1, 1, 144)
    for kind, target_ms in asked_for(
        args, {"lognormal(1)": 20, "drift": 20, "lognormal(0.5)": 150, "recorded": None}
    ):

        def measure(seed):
            load = KINDS[kind](seed)
            table, ms = plan(load, *shape, args.repeats)
            exact = range(min(args.exact_layers, len(load)))
            ratio = [
                base.balancedness(load[i : i + 1], table[i : i + 1], 144) / base.best_pairs(load[i], 144)
                for i in exact
            ]
            later = base.drift(load, seed)
            again, _ = plan(later, *shape, 1, table)
            fresh, _ = plan(later, *shape, 1)
            fewest = base.fewest_moves(table[:6], fresh[:6], 144).sum()
            greedy, greedy_ms = greedy_plan(load, *shape)
            return (
                base.balancedness(load, table, 144),
                base.balancedness(load, greedy, 144),
                ms,
                min(ratio, default=1.0),
                (again[:6] != table[:6]).sum() / fewest,
                greedy_ms,
            )

        got, greedy, ms, ratio, moves, greedy_ms = over_seeds(args, measure)
        target = {"lognormal(0.5)": 0.965, "recorded": None}.get(kind, 0.998 * got / ratio)
        yield Row(
            "C",
            kind,
            got,
            greedy,
            got / ratio,
            target,
            ms,
            target_ms,
            moves,
            1.05,
            f"moves / minimum for these sets, after a drift step; {ratio:.4f} of the integer program, worst "
            f"of {args.exact_layers} layers; greedy: {greedy_ms:.0f} ms",
        )


def case_d(args):
    """320 ranks with one slot each. The 257th expert is a shared one, which every token picks."""
    shape = (320, 1, 1, 320)

    def with_shared(load):
        return np.concatenate([load, load.sum(1, keepdims=True) / base.TOP_K], 1)

    for kind, step in asked_for(args, STEPS):

        def measure(seed):
            load, later = map(with_shared, step(seed))
            old, ms = plan(load, *shape, args.repeats)
            table, _ = plan(later, *shape, 1, old)
            best = []  # with one slot per rank, it is optimal to split the largest part repeatedly
            for w in later:
                count = np.ones(257)
                for _ in range(320 - 257):
                    count[np.argmax(w / count)] += 1
                best.append((w.sum() / 320) / (w / count).max())
            return (
                base.balancedness(load, old, 320),
                base.balancedness(later, table, 320),
                np.mean(best),
                ms,
                100 * (table != old).mean(),
            )

        first, got, bound, ms, changed = over_seeds(args, measure)
        drift = kind == "drift"
        yield Row(
            "D",
            kind,
            got,
            None,
            bound,
            bound * (1 - 1e-9) if drift else None,
            ms,
            None,
            changed,
            3 if drift else None,
            f"% of the ranks change; first placement {first:.4f}",
        )
