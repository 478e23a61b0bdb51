"""Rows, loads and timing of `python -m bench balance`."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from moecomm._native import balance as native

from . import balance_baseline as base
from . import balance_recorded

DRIFT_STEPS = 3


@dataclass
class Row:
    """One line: measured balancedness, that of the greedy placement, a bound, targets, time and moves (see note)."""

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
        """Names of missed targets; None without targets."""
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
        """Line of the table."""

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


def best_time(call, repeats):
    """Milliseconds of the fastest call."""
    best = 1e9
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def plan(load, slots, groups, nodes, ranks, repeats, previous=None, **options):
    """Compute a placement: (table [L, P], milliseconds, scaled to the number of layers of generated loads)."""
    table = np.empty((len(load), slots), dtype=np.int32)
    ms = best_time(lambda: native.rebalance(load, table, groups, nodes, ranks, previous, **options), repeats)
    return table, ms * base.LAYERS / len(load)


def greedy_plan(load, *shape):
    """Compute the greedy placement: (table [L, P], milliseconds, scaled as in plan)."""
    tables = []
    ms = best_time(lambda: tables.append(base.plain_greedy(load, *shape)), 1)
    return tables[0], ms * base.LAYERS / len(load)


def over_seeds(args, measure):
    """Means over the seeds of the numbers that measure(seed) returns."""
    return [float(np.mean(column)) for column in zip(*(measure(seed) for seed in range(args.seeds)))]


def drifted(seed, steps=DRIFT_STEPS):
    """lognormal(1) after some drift steps."""
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


# (load for which a placement is made, later load): after a drift step, or of the text that follows.
STEPS = {
    "drift": lambda s: (base.lognormal(1, s), base.drift(base.lognormal(1, s), s)),
    "recorded": lambda s: (balance_recorded.recorded(s), balance_recorded.recorded(s + 1)),
}


def asked_for(args, kinds):
    """(name, value) of the loads that --loads selects."""
    return [(kind, kinds[kind]) for kind in kinds if kind in args.loads.split(",")]
