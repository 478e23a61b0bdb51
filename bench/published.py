"""`python -m bench published`: predictions of the sim world for clusters with published measurements.

At most three constants are fitted, on two rows. All other numbers are predictions. The published systems are DeepEP
V1 and V2, so the routing is chosen for the same traffic: in decode they send one message per (token, expert), while
moecomm sends one per (token, rank). So the picks of a token are on distinct ranks here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import torch

from moecomm import clusters, gate, options, sim

HIDDEN, TOP_K = 7168, 8
FITTED = ("launch", "rail_rate")
FIT_ROWS = (8, 64)  # ranks of the decode rows on which the constants are fitted


@dataclass(frozen=True)
class Decode:
    """Published us of decode dispatch (FP8) and combine (BF16) on H800, with 128 tokens per rank."""

    ranks: int
    dispatch: float
    combine: float


@dataclass(frozen=True)
class Throughput:
    """Published logical GB/s per rank of dispatch (FP8) and combine (BF16).

    V2 runs several channels (warps) on a multiprocessor.
    """

    system: str
    cluster: str
    ranks: int
    tokens: int
    sms: int
    channels: int
    top_groups: int
    dispatch: float
    combine: float


# Source: DeepEP README, low-latency kernels, H800 + CX7.
DECODE = [
    Decode(8, 77, 114),
    Decode(16, 118, 195),
    Decode(32, 155, 273),
    Decode(64, 173, 314),
    Decode(128, 192, 369),
    Decode(256, 194, 360),
]
# Source: DeepEP README, normal kernels (V1: bandwidth of NVLink at EP8, of RDMA above) and its V2 announcement.
THROUGHPUT = [
    Throughput("V1", "h800", 8, 4096, 24, 24, 4, 153, 158),
    Throughput("V1", "h800", 16, 4096, 24, 24, 4, 43, 43),
    Throughput("V1", "h800", 32, 4096, 24, 24, 4, 58, 57),
    Throughput("V1", "h800", 64, 4096, 24, 24, 4, 51, 50),
    Throughput("V2", "h100", 16, 8192, 12, 48, 8, 90, 81),
    Throughput("V2", "h100", 32, 8192, 6, 24, 8, 61, 61),
]


def decode_routing(ranks, experts=256, tokens=128):
    """Random picks on distinct ranks, by rank."""
    g = torch.Generator().manual_seed(ranks)
    per_rank = experts // ranks
    owners = torch.rand((ranks, tokens, max(ranks, TOP_K)), generator=g).argsort(-1)[..., :TOP_K] % ranks
    return list(owners * per_rank + torch.randint(0, per_rank, owners.shape, generator=g))


def predict_decode(row, hardware, sms=24):
    """Predict (dispatch us, combine us) of a Decode row: mean over ranks, second step."""
    c = sim.Cluster(
        row.ranks,
        ranks_per_node=8,
        hidden=HIDDEN,
        num_experts=256,
        top_k=TOP_K,
        max_tokens=128,
        num_sms=sms,
        hardware=hardware,
        decode=True,
    )
    step = c.decode_step(decode_routing(row.ranks), steps=2)
    return float(step.dispatch_us.mean()), float(step.combine_us.mean())


def predict_throughput(row, hardware):
    """Predict (dispatch GB/s, combine GB/s, dispatch us, combine us), with logical bytes and a reused plan."""
    g = torch.Generator().manual_seed(row.ranks)
    ids = [
        gate.group_limited_top_k(
            torch.rand((row.tokens, 256), generator=g), TOP_K, num_groups=8, top_groups=row.top_groups
        )
        for _ in range(row.ranks)
    ]
    c = sim.Cluster(
        row.ranks,
        ranks_per_node=8,
        hidden=HIDDEN,
        num_experts=256,
        top_k=TOP_K,
        max_tokens=row.tokens,
        num_sms=row.sms,
        channels=row.channels,
        hardware=hardware,
    )
    c.reset(lead_ns=sim.LEAD_NS)
    p = c.program()
    p.dispatch(ids, layout="rank", quant="given")
    c.run(p)
    hop = "node" if row.ranks <= 8 else "rail"
    dispatched = np.mean([s[hop]["logical_rows"] for s in c.stats()])
    p = c.program()
    p.dispatch(quant="given")
    p.combine()
    times = c.run(p)
    dispatch_us, combine_us = (times[:, :, 1] - times[:, :, 0]).mean(1)
    return (
        dispatched * HIDDEN / dispatch_us / 1e3,
        dispatched * 2 * HIDDEN / combine_us / 1e3,
        float(dispatch_us),
        float(combine_us),
    )


def fit(rows=None):
    """Fit the constants FITTED of the H800 table to FIT_ROWS by least squares; return the Hardware."""
    from scipy.optimize import least_squares

    rows = rows or [r for r in DECODE if r.ranks in FIT_ROWS]
    base = clusters.load("h800").hardware
    start = np.array([getattr(base, name) for name in FITTED])

    def errors(scale):
        hardware = replace(base, **dict(zip(FITTED, map(float, start * scale))))
        return [
            e for r in rows for e in np.log(np.array(predict_decode(r, hardware)) / (r.dispatch, r.combine))
        ]

    found = least_squares(errors, np.ones(len(FITTED)), diff_step=0.05, bounds=(0.2, 20), xtol=1e-3)
    return replace(base, **dict(zip(FITTED, map(float, start * found.x))))


def arguments(parser):
    """Add the options of the command."""
    parser.add_argument("--decode-only", action="store_true", help="skip the throughput rows (a minute)")
    parser.add_argument("--json", type=options.file_to_write, help="also write the table to this file")


def main(args):
    """Fit, predict and compare."""
    hardware = fit()
    base = clusters.load("h800").hardware
    print(
        "fitted on the decode rows of "
        + " and ".join(f"EP{r}" for r in FIT_ROWS)
        + ": "
        + ", ".join(
            f"{name} {getattr(hardware, name):.4g} (table: {getattr(base, name):.4g})" for name in FITTED
        )
    )
    table, judged = [], []
    print(f"{'decode, H800':24} {'published us':>14} {'predicted us':>16} {'error %':>14}")
    for row in DECODE:
        got = predict_decode(row, hardware)
        errors = [100 * (p / m - 1) for p, m in zip(got, (row.dispatch, row.combine))]
        fitted = row.ranks in FIT_ROWS
        judged += [] if fitted else errors
        table.append(
            {
                "row": f"decode EP{row.ranks}",
                "published": [row.dispatch, row.combine],
                "predicted": got,
                "error_percent": errors,
                "fitted": fitted,
            }
        )
        print(
            f"EP{row.ranks:<5}{'(fitted)' if fitted else '':16} {row.dispatch:7.0f}{row.combine:7.0f} "
            f"{got[0]:9.1f}{got[1]:8.1f} {errors[0]:8.1f}{errors[1]:7.1f}",
            flush=True,
        )
    print(
        f"predicted decode rows: median error {np.median(np.abs(judged)):.1f}%, worst {np.max(np.abs(judged)):.1f}%"
    )
    if not args.decode_only:
        print(f"{'throughput':24} {'published GB/s':>14} {'predicted GB/s':>16} {'error %':>14}")
        errors_all = []
        for row in THROUGHPUT:
            own = (
                hardware
                if row.cluster == "h800"
                else replace(
                    clusters.load(row.cluster).hardware, launch=hardware.launch, rail_rate=hardware.rail_rate
                )
            )
            got = predict_throughput(row, own)
            errors = [100 * (p / m - 1) for p, m in zip(got, (row.dispatch, row.combine))]
            errors_all += errors
            name = f"{row.system} {row.cluster} EP{row.ranks}, {row.sms} SMs"
            table.append(
                {
                    "row": name,
                    "published": [row.dispatch, row.combine],
                    "predicted": got[:2],
                    "error_percent": errors,
                    "fitted": False,
                }
            )
            print(
                f"{name:24} {row.dispatch:7.0f}{row.combine:7.0f} {got[0]:9.1f}{got[1]:8.1f} "
                f"{errors[0]:8.1f}{errors[1]:7.1f}",
                flush=True,
            )
        print(
            f"throughput rows: median error {np.median(np.abs(errors_all)):.1f}%, worst "
            f"{np.max(np.abs(errors_all)):.1f}%"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"constants": {name: getattr(hardware, name) for name in FITTED}, "rows": table},
                file,
                indent=1,
            )
