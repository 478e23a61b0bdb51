"""Part of `python -m bench balance`: the split of picks over replicas, and the choice of active replicas."""

from __future__ import annotations

import numpy as np

from moecomm._native import balance as native

from . import balance_baseline as base
from .balance_rows import STEPS, Row, asked_for, best_time, over_seeds, plan


def replicas_of(row, ranks=32):
    """Native replica index of one layer."""
    return native.Replicas(np.ascontiguousarray(row, dtype=np.int32), base.EXPERTS, ranks, 1)


def whole_tokens(load, replicas):
    """Balancedness of one layer if its split is rounded to whole tokens of a batch of 32 x 4096."""
    counts = np.round(load * (32 * 4096 * base.TOP_K / load.sum())).astype(np.int32)
    share, first, last = np.empty(replicas.count), *np.empty((2, replicas.count), dtype=np.int32)
    replicas.split(counts.astype(float), share)
    replicas.runs(counts, share, 0, first, last)
    return counts.sum() / replicas.ranks / np.bincount(replicas.rank, last - first, replicas.ranks).max()


def split_layers(load, table, args):
    """(balancedness of the split, in whole tokens, of the linear program, worst loss in a layer, ms per layer).

    The first three are means over layers.
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
    """Split a batch over replicas that were placed for an earlier load or a small sample. Shape of case B."""
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
        note=f"connected placement from 1/8 of the picks; greedy: even split; whole tokens {whole:.4f}",
    )


def case_activate(args):
    """32 ranks have 16 slots each and run 9 of them. The placement is one drift step old. Bound: all 16 slots run."""

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
            note="16 slots, 9 active, one drift step later; ms per layer; "
            f"layers without a valid choice: {stuck:.0f}; bound: all 16 run",
        )
