"""The per-batch part of `python -m bench balance`: copies of hot experts that a number of bytes allows.

MoonEP and UltraEP (arXiv 2606.04101) report max/mean 1.01 to 1.04 per batch inside one NVLink domain. Here 64 ranks
lie in 8 nodes, and copies may cross them.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from moecomm.balance import Placement, prefetch

from . import balance_baseline as base
from .balance_rows import Row, asked_for

RANKS, NODES, SPARE = 64, 8, 2
PUBLISHED = 1 / 1.04  # as balancedness
BUDGETS = (16, 32, 64)  # copies of an expert


def at_home():
    """Every expert on one rank; spare slots begin with the next rank's."""
    own = base.EXPERTS // RANKS
    ids = torch.arange(base.EXPERTS).view(RANKS, own)
    return Placement(torch.cat([ids, ids.roll(-1, 0)[:, :SPARE]], 1).view(1, -1), base.EXPERTS, RANKS, NODES)


def case_batch(args):
    """One layer's batch. The target is that of the largest budget; times include the search."""
    kinds = {
        "lognormal(1)": lambda s: base.lognormal(1, s),
        "zipf": lambda s: base.zipf(s, 1 / base.TOP_K),
    }
    before = at_home()
    for kind, make in asked_for(args, kinds):
        for budget in BUDGETS:
            rows, ms = [], []
            for seed in range(args.seeds):
                load = make(seed)[:1]
                begin = time.perf_counter()
                paid = prefetch(load, before, spare=SPARE, bytes_per_expert=1, budget=budget).paid
                assert paid is not None
                ms.append(1e3 * (time.perf_counter() - begin))
                rows.append(
                    [paid.imbalance[0], paid.before[0], paid.unlimited[0], paid.rail_bytes, paid.node_bytes]
                )
            now, was, best, rail, node = np.array(rows, dtype=float).mean(0)
            yield Row(
                "batch",
                kind,
                1 / now,
                1 / was,
                1 / best,
                PUBLISHED if budget == max(BUDGETS) else None,
                float(np.median(ms)),
                note=f"max/mean {now:.4f}, was {was:.2f}; budget {budget} experts, paid {rail:.1f} over the rail and "
                f"{node:.1f} inside nodes; greedy: no copies; bound: no budget",
            )
