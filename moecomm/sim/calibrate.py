"""`python -m moecomm calibrate`: fits the sim world to this machine and checks its predictions.

Rank threads of the cpu world, one per core, run dispatch, combine and decode at some sizes. The constants of
sim.Hardware that affect these times are fitted. Then other sizes are predicted and measured. The constants are
written to a table that `moecomm.clusters.load` reads.
"""

from __future__ import annotations

from typing import Any
import argparse

import os
import time
from dataclasses import asdict, replace

import numpy as np
import torch

from .. import local, options
from ..buffer import Buffer
from ..checks import require
from .world import Cluster, Hardware

HIDDEN, EXPERTS_PER_RANK, TOP_K = 2048, 8, 4
OPS = ("dispatch", "combine", "decode dispatch", "decode combine")
FIT_TOKENS, TEST_TOKENS = (128, 1024), (192, 384, 768)


def routing(ranks: Any, tokens: Any) -> Any:
    """Random uniform picks, int64 [tokens, TOP_K], for each rank."""
    g = torch.Generator().manual_seed(tokens)
    return [
        torch.rand((tokens, EXPERTS_PER_RANK * ranks), generator=g, dtype=torch.float32, device="cpu")
        .argsort(1)[:, :TOP_K]
        .contiguous()
        for _ in range(ranks)
    ]


def measure(ranks: Any, sizes: Any, repeats: int) -> Any:
    """{tokens: us of each of OPS}: mean over ranks, then median over repeats. The sizes are interleaved."""

    def run(comm: Any) -> Any:
        world = {
            t: (
                Buffer(comm, hidden=HIDDEN, num_experts=EXPERTS_PER_RANK * ranks, top_k=TOP_K, max_tokens=t),
                routing(ranks, t)[comm.rank],
                torch.randn((t, HIDDEN), dtype=torch.float32, device="cpu").to(torch.bfloat16),
                torch.rand((t, TOP_K), dtype=torch.float32, device="cpu"),
            )
            for t in sizes
        }
        times: Any = {t: [] for t in sizes}
        for _ in range(repeats + 3):
            for t, (buf, ids, x, weights) in world.items():
                comm.barrier()
                began = time.perf_counter()
                out = buf.dispatch(x, ids)
                dispatched = time.perf_counter()
                comm.barrier()
                combining = time.perf_counter()
                buf.combine(out.handle.rows, out.handle)
                combined = time.perf_counter()
                del out
                comm.barrier()
                decoding = time.perf_counter()
                recv, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
                decoded = time.perf_counter()
                comm.barrier()
                answering = time.perf_counter()
                buf.decode_combine(recv.handle.rows, ids, weights, recv.handle, return_hook=False)
                times[t].append(
                    (
                        dispatched - began,
                        combined - combining,
                        decoded - decoding,
                        time.perf_counter() - answering,
                    )
                )
        return {t: np.array(values[3:]) for t, values in times.items()}

    by_rank = local.run_local(run, ranks)
    return {t: 1e6 * np.median(np.mean([one[t] for one in by_rank], axis=0), axis=0) for t in sizes}


def predict(ranks: Any, tokens: Any, hardware: Any) -> Any:
    """Predicted time of each of OPS, in us."""
    c = Cluster(
        ranks,
        hidden=HIDDEN,
        num_experts=EXPERTS_PER_RANK * ranks,
        top_k=TOP_K,
        max_tokens=tokens,
        channels=1,
        num_sms=2,
        hardware=hardware,
        decode=True,
        schedule="lane",
    )
    ids = routing(ranks, tokens)
    step = c.step(ids)
    dispatch, combine = step.dispatch_us.mean(), step.combine_us.mean()
    step = c.decode_step(ids, quant=None)
    return np.array([dispatch, combine, step.dispatch_us.mean(), step.combine_us.mean()])


# The link between ranks of one machine is memory. Its rate is set high: the copying core limits it.
START = Hardware(
    node_rate=1000.0,
    node_latency=200.0,
    rail_rate=1000.0,
    rail_latency=1000.0,
    sm_read=10.0,
    sm_write=10.0,
    put=20.0,
    poll=500.0,
    launch=60_000.0,
    plan_token=1_500.0,
)
FITTED = ("launch", "plan_token", "sm_read", "sm_write")


def fit(ranks: Any, measured: Any) -> Any:
    """Fit the constants FITTED to the measured times by least squares; return the Hardware."""
    from scipy.optimize import least_squares  # type: ignore[import-untyped]

    def hardware(log: Any) -> Any:
        return replace(
            START, **{name: float(getattr(START, name) * np.exp(v - 1)) for name, v in zip(FITTED, log)}
        )

    def errors(log: Any) -> Any:
        h = hardware(log)
        return np.concatenate([np.log(predict(ranks, t, h) / us) for t, us in measured.items()])

    return hardware(least_squares(errors, np.ones(len(FITTED)), diff_step=0.05, bounds=(-4, 6)).x)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--ranks",
        type=options.ranks,
        default=len(os.sched_getaffinity(0)),
        help="rank threads; default: one per core",
    )
    parser.add_argument("--repeats", type=options.positive, default=40)
    parser.add_argument("--out", type=options.file_to_write, help="table to write, .toml")


def main(args: argparse.Namespace) -> None:
    """Measure, fit, predict and compare."""
    require(args.ranks <= local.MOST_RANKS, "calibrate", "--ranks", args.ranks, f"at most {local.MOST_RANKS}")
    measured = measure(args.ranks, sorted({*FIT_TOKENS, *TEST_TOKENS}), args.repeats)
    hardware = fit(args.ranks, {t: measured[t] for t in FIT_TOKENS})
    print(
        f"{args.ranks} rank threads, hidden {HIDDEN}, {EXPERTS_PER_RANK} experts per rank, top {TOP_K}, bf16; "
        f"fitted at {FIT_TOKENS} tokens: "
        + ", ".join(f"{name} {getattr(hardware, name):.4g}" for name in FITTED)
    )
    print(f"{'tokens':>8} {'':16} {'measured us':>12} {'predicted us':>12} {'error %':>8}")
    worst = 0.0
    for tokens in TEST_TOKENS:
        for op, us, predicted in zip(OPS, measured[tokens], predict(args.ranks, tokens, hardware)):
            error = 100 * (predicted / us - 1)
            worst = max(worst, abs(error))
            print(f"{tokens:8} {op:16} {us:12.1f} {predicted:12.1f} {error:8.1f}")
    print(f"worst error at sizes that were not fitted: {worst:.1f}%")
    if args.out:
        with open(args.out, "w") as file:
            file.write(
                f'description = "this machine, {args.ranks} rank threads; python -m moecomm calibrate"\n'
                f"ranks_per_node = {args.ranks}\n\n[hardware]\n"
            )
            file.writelines(f"{name} = {value}\n" for name, value in asdict(hardware).items())
