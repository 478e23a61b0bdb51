"""`python -m bench balance`: quality, time and moves of plans and splits, against a plain greedy and against bounds.

Balancedness is the mean over 58 layers of mean/max rank load, and over seeds. Times are of the native core, one
thread, all layers; the best of several runs.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import numpy as np

from moecomm._native import balance as native

from . import balance_baseline as base
from . import balance_step

DRIFT_STEPS = 3


@dataclass
class Row:
    """One line: what was measured, against the greedy, a bound and a target where there are such."""

    case: str
    load: str
    got: float
    greedy: float | None = None
    bound: float | None = None
    target: float | None = None
    ms: float | None = None
    target_ms: float | None = None
    note: str = ""

    def text(self):
        """The table's line."""
        def number(v, digits=4):
            return "-" if v is None else f"{v:.{digits}f}"
        met = (self.target is None or self.got >= self.target) and (self.target_ms is None or self.ms <= self.target_ms)
        verdict = "" if self.target is None and self.target_ms is None else "reached" if met else "missed"
        return (f"{self.case:<13} {self.load:<15} {number(self.got):>7} {number(self.greedy):>7} {number(self.bound):>7} {number(self.target):>7} "
                f"{number(self.ms, 3):>9} {number(self.target_ms, 2):>7}  {verdict:<8}{self.note}")


HEADER = f"# {'case':<11} {'load':<15} {'got':>7} {'greedy':>7} {'bound':>7} {'target':>7} {'ms':>9} {'target':>7}"


def arguments(parser):
    """Which cases, how many seeds, where results go."""
    parser.add_argument("--cases", default="A,B,C,D,split,activate,step", help="comma-separated: A B C D split activate step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="runs per time")
    parser.add_argument("--exact-layers", type=int, default=2, help="layers per seed that the integer program solves (case C)")
    parser.add_argument("--json", help="append the rows to this file, one JSON object per line")


def main(args):
    """Print the table; writes JSON lines where asked."""
    runs = dict(A=case_a, B=case_b, C=case_c, D=case_d, split=case_split, activate=case_activate, step=balance_step.run)
    wanted = args.cases.split(",")
    if unknown := [c for c in wanted if c not in runs]:
        raise SystemExit(f"--cases: got {unknown[0]}; expected some of {', '.join(runs)}")
    print(HEADER)
    for case in wanted:
        for row in runs[case](args):
            row = Row(**row) if isinstance(row, dict) else row
            print(row.text(), flush=True)
            if args.json:
                with open(args.json, "a") as f:
                    f.write(json.dumps(asdict(row)) + "\n")


def plan(load, slots, groups, nodes, ranks, repeats, previous=None, **options):
    """(table [L, P], milliseconds)."""
    table = np.empty((len(load), slots), dtype=np.int32)
    best = 1e9
    for _ in range(repeats):
        start = time.perf_counter()
        native.rebalance(load, table, groups, nodes, ranks, previous, **options)
        best = min(best, time.perf_counter() - start)
    return table, 1e3 * best


def over_seeds(args, measure):
    """Means over the seeds of what measure(seed) returns, a tuple of numbers."""
    return [float(np.mean(column)) for column in zip(*(measure(seed) for seed in range(args.seeds)))]


def drifted(seed, steps=DRIFT_STEPS):
    """lognormal(1) after some steps of drift."""
    load = base.lognormal(1, seed)
    for step in range(steps):
        load = base.drift(load, seed + 100 * step)
    return load


KINDS = {"lognormal(1)": lambda s: base.lognormal(1, s), "lognormal(0.5)": lambda s: base.lognormal(0.5, s), "zipf": base.zipf, "drift": drifted}


def case_a(args):
    """32 ranks in 4 nodes, 288 slots, groups stay in a node."""
    shape = (288, 8, 4, 32)
    for kind, make in KINDS.items():
        def measure(seed):
            load = make(seed)
            table, ms = plan(load, *shape, args.repeats)
            return base.balancedness(load, table, 32), base.balancedness(load, base.plain_greedy(load, *shape), 32), base.pairing_bound(load, 4), ms
        got, greedy, bound, ms = over_seeds(args, measure)
        yield Row("A", kind, got, greedy, bound, 0.755 if kind == "zipf" else 0.999 * bound, ms, 15 if kind == "zipf" else 10)


def case_b(args):
    """32 ranks, 288 slots, no groups; then few moves on a drift step."""
    shape = (288, 1, 1, 32)
    for kind, make in KINDS.items():
        def measure(seed):
            load = make(seed)
            table, ms = plan(load, *shape, args.repeats)
            return base.balancedness(load, table, 32), base.balancedness(load, base.plain_greedy(load, *shape), 32), ms
        got, greedy, ms = over_seeds(args, measure)
        yield Row("B", kind, got, greedy, 1.0, 0.999, ms, 5)
    for moves, target in ((1, 0.98), (2, 0.995)):
        def measure(seed):
            load = base.lognormal(1, seed)
            later = base.drift(load, seed)
            old, _ = plan(load, *shape, 1)
            table, ms = plan(later, *shape, args.repeats, old, max_moves=moves)
            changed = (table != old).reshape(len(load), 32, -1).sum(2)
            return base.balancedness(later, table, 32), base.balancedness(later, old, 32), ms, changed.max(), changed.mean()
        got, stale, ms, most, mean = over_seeds(args, measure)
        yield Row("B moves", f"drift, <= {moves}", got, stale, 1.0, target, ms, 70, f"greedy: stale placement; moved {mean:.2f} per rank, at most {most:.0f}")


def case_c(args):
    """144 ranks, 288 slots: counts matter, and pairs."""
    shape = (288, 1, 1, 144)
    for kind, target_ms in (("lognormal(1)", 20), ("drift", 20), ("lognormal(0.5)", 150)):
        def measure(seed):
            load = KINDS[kind](seed)
            table, ms = plan(load, *shape, args.repeats)
            exact = range(min(args.exact_layers, len(load)))
            ratio = [base.balancedness(load[i:i + 1], table[i:i + 1], 144) / base.best_pairs(load[i], 144) for i in exact]
            later = base.drift(load, seed)
            again, _ = plan(later, *shape, 1, table)
            fresh, _ = plan(later, *shape, 1)
            fewest = base.fewest_moves(table[:6], fresh[:6], 144).sum()
            return (base.balancedness(load, table, 144), base.balancedness(load, base.plain_greedy(load, *shape), 144), ms, min(ratio, default=1.0),
                    (again[:6] != table[:6]).sum() / fewest)
        got, greedy, ms, ratio, moves = over_seeds(args, measure)
        note = f"{ratio:.4f} of the integer program, worst of {args.exact_layers} layers; moves on a drift step {moves:.3f} of the fewest for these sets"
        yield Row("C", kind, got, greedy, got / ratio, 0.965 if kind == "lognormal(0.5)" else 0.998 * got / ratio, ms, target_ms, note)


def case_d(args):
    """320 ranks with one slot each; a shared expert, which every token picks, as the 257th."""
    shape = (320, 1, 1, 320)

    def with_shared(load):
        return np.concatenate([load, load.sum(1, keepdims=True) / base.TOP_K], 1)

    def measure(seed):
        load = base.lognormal(1, seed)
        later = with_shared(base.drift(load, seed))
        load = with_shared(load)
        old, ms = plan(load, *shape, args.repeats)
        table, _ = plan(later, *shape, 1, old)
        best = []   # splitting the largest piece is optimal for one slot per rank
        for w in later:
            count = np.ones(257)
            for _ in range(320 - 257):
                count[np.argmax(w / count)] += 1
            best.append(w.sum() / 320 / (w / count).max())
        return base.balancedness(load, old, 320), base.balancedness(later, table, 320), np.mean(best), ms, (table != old).mean()
    first, got, bound, ms, changed = over_seeds(args, measure)
    yield Row("D", "drift", got, None, bound, bound * (1 - 1e-9), ms, None,
              f"first plan {first:.4f}; {100 * changed:.1f} % of ranks change (target 3 %: {'reached' if changed <= 0.03 else 'missed'})")


def replicas_of(row, ranks=32):
    """The native index of one layer."""
    return native.Replicas(np.ascontiguousarray(row, dtype=np.int32), base.EXPERTS, ranks, 1)


def best_time(call, repeats):
    """Milliseconds of the fastest call."""
    best = 1e9
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def split_layers(load, table, args, exact=0):
    """(balancedness of the split, worst distance to the linear program, ms per layer) over the layers."""
    got, gap, times = [], [], []
    for i, (w, row) in enumerate(zip(load, table)):
        r, share = replicas_of(row), np.empty(len(row))
        times.append(best_time(lambda: r.split(w, share), args.repeats))
        got.append(w.sum() / r.ranks / r.split(w, share))
        if i < exact:
            gap.append(w.sum() / r.ranks / base.best_split(w, r) - got[-1])
    return np.mean(got), max(gap, default=0.0), np.median(times)


def case_split(args):
    """Tokens of a batch over replicas that were placed one drift step, or one small sample, earlier; case B's shape."""
    for connected in (False, True):
        def measure(seed):
            load = base.lognormal(1, seed)
            table, _ = plan(load, 288, 1, 1, 32, 1, connected=connected)
            later = base.drift(load, seed)
            return *split_layers(later, table, args, exact=10), base.balancedness(later, table, 32)
        got, gap, ms, even = over_seeds(args, measure)
        yield Row("split", "drift", got, even, got + gap, 0.95 if connected else got + gap - 0.01, ms, 0.01,
                  f"{'connected' if connected else 'ordinary'} placement; greedy: even split; within {gap:.4f} of the linear program")

    def sampled(seed):
        chances = base.lognormal(1, seed)
        chances /= chances.sum(1, keepdims=True)
        generator = np.random.default_rng(seed)
        batch = 32 * 4096 * base.TOP_K
        counts, sample = (np.stack([generator.multinomial(n, p) for p in chances]).astype(float) for n in (batch, batch // 8))
        table, _ = plan(sample, 288, 1, 1, 32, 1, connected=True)
        return *split_layers(counts, table, args), base.balancedness(counts, table, 32)
    got, _, ms, even = over_seeds(args, sampled)
    yield Row("split", "1/8 sample", got, even, 1.0, 0.997, ms, 0.01, "connected placement from an eighth of the picks; greedy: even split")


def case_activate(args):
    """32 ranks host 16 slots each and run 9; placement of one drift step earlier."""
    for kind, most, target in (("lognormal(1)", None, 0.985), ("zipf", 1 / base.TOP_K, 0.975)):
        def measure(seed):
            load = base.zipf(seed, most) if most else base.lognormal(1, seed)
            table, _ = plan(load, 512, 1, 1, 32, 1, connected=True)
            got, times, stuck = [], [], 0
            for w, row in zip(base.drift(load, seed, most), table):
                r, active, share = replicas_of(row), np.empty(512, dtype=np.uint8), np.empty(512)
                times.append(best_time(lambda: r.activate(w, 9, active), args.repeats))
                stuck += r.activate(w, 9, active) >= 0
                got.append(w.sum() / 32 / r.split(w, share, active))
            return np.mean(got), np.median(times), stuck
        got, ms, stuck = over_seeds(args, measure)
        yield Row("activate", kind, got, None, 1.0, target, ms, 0.5, f"16 hosted, 9 active; ms per layer; layers without a choice: {stuck:.0f}")
