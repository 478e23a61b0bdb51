"""`python -m bench balance`: quality, time and moves of plans and splits, against a plain greedy and against bounds.

Balancedness is the mean over layers of mean/max rank load, and over seeds. Times are of the native core, one
thread, 58 layers; the best of several runs.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import numpy as np

from moecomm import options
from moecomm._native import balance as native

from . import balance_baseline as base
from . import balance_recorded, balance_step

DRIFT_STEPS = 3


@dataclass
class Row:
    """One line: what was measured, the greedy plan's value, a bound and targets if there are any; moves as
    the note counts them.
    """

    case: str
    load: str
    got: float
    greedy: float | None = None
    bound: float | None = None
    target: float | None = None
    ms: float | None = None
    target_ms: float | None = None
    moves: float | None = None
    target_moves: float | None = None
    note: str = ""

    def missed(self):
        """Names of the targets that were missed; None where there are no targets."""
        targets = {
            "balance": (self.target, self.got, 1),
            "time": (self.target_ms, self.ms, -1),
            "moves": (self.target_moves, self.moves, -1),
        }
        missed = [
            name
            for name, (target, value, sign) in targets.items()
            if target is not None and sign * value < sign * target
        ]
        return missed if any(target is not None for target, _, _ in targets.values()) else None

    def text(self):
        """The table's line."""

        def number(v, digits=4):
            return "-" if v is None else f"{v:.{digits}f}"

        missed = self.missed()
        verdict = "" if missed is None else "reached" if not missed else "missed: " + ", ".join(missed)
        return (
            f"{self.case:<9} {self.load:<16} {number(self.got):>7} {number(self.greedy):>7} "
            f"{number(self.bound):>7} {number(self.target):>7} "
            f"{number(self.ms, 3):>9} {number(self.target_ms, 2):>7} {number(self.moves, 2):>6} "
            f"{number(self.target_moves, 2):>6}  {verdict:<8} {self.note}"
        )


HEADER = (
    f"# {'case':<7} {'load':<16} {'got':>7} {'greedy':>7} {'bound':>7} {'target':>7} {'ms':>9} {'target':>7} "
    f"{'moves':>6} {'target':>6}"
)


def arguments(parser):
    """Which cases, how many seeds, where results go."""
    parser.add_argument(
        "--cases",
        type=options.some_of("A", "B", "C", "D", "split", "activate", "step"),
        default="A,B,C,D,split,activate,step",
        help="comma-separated: A B C D split activate step",
    )
    parser.add_argument(
        "--loads",
        type=options.some_of(*KINDS),
        default=",".join(KINDS),
        help="comma-separated: only these (recorded: real text through gates that are trained first)",
    )
    parser.add_argument("--seeds", type=options.positive, default=3)
    parser.add_argument("--repeats", type=options.positive, default=5, help="runs per time")
    parser.add_argument(
        "--exact-layers",
        type=options.count,
        default=2,
        help="layers per seed that integer programs (case C) and linear ones (activate) solve",
    )
    parser.add_argument(
        "--json", type=options.file_to_write, help="append the rows to this file, one JSON object per line"
    )


def main(args):
    """Print the table; writes JSON lines where asked."""
    runs = dict(
        A=case_a,
        B=case_b,
        C=case_c,
        D=case_d,
        split=case_split,
        activate=case_activate,
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


def best_time(call, repeats):
    """Milliseconds of the fastest call."""
    best = 1e9
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def plan(load, slots, groups, nodes, ranks, repeats, previous=None, **options):
    """(table [L, P], milliseconds for as many layers as the generated loads have)."""
    table = np.empty((len(load), slots), dtype=np.int32)
    ms = best_time(lambda: native.rebalance(load, table, groups, nodes, ranks, previous, **options), repeats)
    return table, ms * base.LAYERS / len(load)


def greedy_plan(load, *shape):
    """(table [L, P], milliseconds likewise): the plain greedy."""
    tables = []
    ms = best_time(lambda: tables.append(base.plain_greedy(load, *shape)), 1)
    return tables[0], ms * base.LAYERS / len(load)


def over_seeds(args, measure):
    """Means over the seeds of what measure(seed) returns, a tuple of numbers."""
    return [float(np.mean(column)) for column in zip(*(measure(seed) for seed in range(args.seeds)))]


def drifted(seed, steps=DRIFT_STEPS):
    """lognormal(1) after some steps of drift."""
    load = base.lognormal(1, seed)
    for step in range(steps):
        load = base.drift(load, seed + 100 * step)
    return load


KINDS = {
    "lognormal(1)": lambda s: base.lognormal(1, s),
    "lognormal(0.5)": lambda s: base.lognormal(0.5, s),
    "zipf": base.zipf,
    "drift": drifted,
    "recorded": balance_recorded.recorded,
}
# What a plan was made for, and the load that then comes: a step of drift, or the text that follows.
STEPS = {
    "drift": lambda s: (base.lognormal(1, s), base.drift(base.lognormal(1, s), s)),
    "recorded": lambda s: (balance_recorded.recorded(s), balance_recorded.recorded(s + 1)),
}


def asked_for(args, kinds):
    """(name, value) of those loads that --loads names."""
    return [(kind, kinds[kind]) for kind in kinds if kind in args.loads.split(",")]


def case_a(args):
    """32 ranks in 4 nodes, 288 slots, groups stay in a node."""
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
                f"slots of a rank at most, {mean:.2f} on average; greedy: stale placement (anew it would "
                f"move {anew:.1f})",
            )


def case_c(args):
    """144 ranks, 288 slots: counts matter, and pairs."""
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
            f"times the fewest for these sets, on a drift step; {ratio:.4f} of the integer program, worst "
            f"of {args.exact_layers} layers; greedy: {greedy_ms:.0f} ms",
        )


def case_d(args):
    """320 ranks with one slot each; a shared expert, which every token picks, as the 257th."""
    shape = (320, 1, 1, 320)

    def with_shared(load):
        return np.concatenate([load, load.sum(1, keepdims=True) / base.TOP_K], 1)

    for kind, step in asked_for(args, STEPS):

        def measure(seed):
            load, later = map(with_shared, step(seed))
            old, ms = plan(load, *shape, args.repeats)
            table, _ = plan(later, *shape, 1, old)
            best = []  # splitting the largest piece is optimal for one slot per rank
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
            f"% of the ranks change; first plan {first:.4f}",
        )


def replicas_of(row, ranks=32):
    """The native index of one layer."""
    return native.Replicas(np.ascontiguousarray(row, dtype=np.int32), base.EXPERTS, ranks, 1)


def whole_tokens(load, replicas):
    """Balancedness of one layer after its split is rounded to the whole tokens of a batch of 32 x 4096."""
    counts = np.round(load * (32 * 4096 * base.TOP_K / load.sum())).astype(np.int32)
    share, first, last = np.empty(replicas.count), *np.empty((2, replicas.count), dtype=np.int32)
    replicas.split(counts.astype(float), share)
    replicas.runs(counts, share, 0, first, last)
    return counts.sum() / replicas.ranks / np.bincount(replicas.rank, last - first, replicas.ranks).max()


def split_layers(load, table, args):
    """Means over the layers, (balancedness of the split, in whole tokens, of the linear program), its worst
    loss in a layer, ms per layer.
    """
    got, whole, best, times = [], [], [], []
    for w, row in zip(load, table):
        r, share = replicas_of(row), np.empty(len(row))
        times.append(best_time(lambda: r.split(w, share), args.repeats))
        got.append(w.sum() / r.ranks / r.split(w, share))
        whole.append(whole_tokens(w, r))
        best.append(w.sum() / r.ranks / base.best_split(w, r))
    return np.mean(got), np.mean(whole), np.mean(best), np.max(np.subtract(best, got)), np.median(times)


def case_split(args):
    """Tokens of a batch over replicas that were placed one drift step, or one small sample, earlier; case B's shape."""
    for kind, step in asked_for(args, STEPS):
        for connected in (False, True):

            def measure(seed):
                load, later = step(seed)
                table, _ = plan(load, 288, 1, 1, 32, 1, connected=connected)
                return *split_layers(later, table, args), base.balancedness(later, table, 32)

            got, whole, bound, gap, ms, even = over_seeds(args, measure)
            yield Row(
                "split",
                kind,
                got,
                even,
                bound,
                0.95 if connected and kind == "drift" else bound - 0.01,
                ms,
                0.01,
                note=f"{'connected' if connected else 'ordinary'} placement; greedy: even split; "
                f"a layer loses at most {gap:.4f} to the linear program; whole tokens {whole:.4f}",
            )

    if "lognormal(1)" not in args.loads.split(","):
        return

    def sampled(seed):
        chances = base.lognormal(1, seed)
        chances /= chances.sum(1, keepdims=True)
        generator = np.random.default_rng(seed)
        batch = 32 * 4096 * base.TOP_K
        counts, sample = (
            np.stack([generator.multinomial(n, p) for p in chances]).astype(float)
            for n in (batch, batch // 8)
        )
        table, _ = plan(sample, 288, 1, 1, 32, 1, connected=True)
        return *split_layers(counts, table, args), base.balancedness(counts, table, 32)

    got, whole, bound, _, ms, even = over_seeds(args, sampled)
    yield Row(
        "split",
        "1/8 sample",
        got,
        even,
        bound,
        0.997,
        ms,
        0.01,
        note=f"connected placement from an eighth of the picks; greedy: even split; whole tokens {whole:.4f}",
    )


def case_activate(args):
    """32 ranks host 16 slots each and run 9; placement of one drift step earlier. The bound: all 16 run."""

    def zipf(seed):
        load = base.zipf(seed, 1 / base.TOP_K)
        return load, base.drift(load, seed, 1 / base.TOP_K)

    for kind, (step, target) in asked_for(
        args,
        {
            "lognormal(1)": (STEPS["drift"], 0.985),
            "zipf": (zipf, 0.975),
            "recorded": (STEPS["recorded"], None),
        },
    ):

        def measure(seed):
            load, later = step(seed)
            table, _ = plan(load, 512, 1, 1, 32, 1, connected=True)
            got, bound, times, stuck = [], [], [], 0
            for i, (w, row) in enumerate(zip(later, table)):
                r, active, share = replicas_of(row), np.empty(512, dtype=np.uint8), np.empty(512)
                times.append(best_time(lambda: r.activate(w, 9, active), args.repeats))
                stuck += r.activate(w, 9, active) >= 0
                got.append(w.sum() / 32 / r.split(w, share, active))
                if i < args.exact_layers:
                    bound.append(w.sum() / 32 / base.best_split(w, r))
            return np.mean(got), np.mean(bound), np.median(times), stuck

        got, bound, ms, stuck = over_seeds(args, measure)
        yield Row(
            "activate",
            kind,
            got,
            None,
            bound,
            target,
            ms,
            0.5,
            note="16 hosted, 9 active, one drift step later; ms per layer; "
            f"layers without a choice: {stuck:.0f}; bound: all 16 run",
        )
