"""Run time of the simulator on one core: a decode step of EP320 and, on request, a round trip of EP64."""

from __future__ import annotations

import resource
import statistics
import time

import torch

from moecomm import clusters, options, sim

HIDDEN, TOP_K = 7168, 8


def arguments(parser):
    """Add the options of the command."""
    parser.add_argument("--cluster", default="h800", help="table of the modeled hardware (default h800)")
    parser.add_argument(
        "--ranks",
        type=options.ranks,
        default=320,
        help="ranks of the decode step, with one expert each (default 320)",
    )
    parser.add_argument(
        "--tokens", type=options.tokens, default=128, help="tokens per rank of the decode step (default 128)"
    )
    parser.add_argument(
        "--steps",
        type=options.positive,
        default=20,
        help="timed decode steps, after a warmup step (default 20)",
    )
    parser.add_argument(
        "--roundtrip",
        action="store_true",
        help="also time a dispatch and combine of 64 ranks with 4096 tokens",
    )


def main(args):
    """Print the run time of a step and its prediction. The exit status is 1 if predictions of equal steps differ."""
    first, seconds, step, same = time_decode(args)
    print(
        f"decode step   EP{args.ranks}, {args.tokens} tokens, top-{TOP_K}: median "
        f"{statistics.median(seconds):.3f} s, fastest {min(seconds):.3f}, "
        f"slowest {max(seconds):.3f} of {len(seconds)}; first {first:.2f}"
    )
    print(
        f"              predicts dispatch {statistics.median(step.dispatch_us):.1f} us, combine "
        f"{statistics.median(step.combine_us):.1f} us (median rank)"
    )
    if args.roundtrip:
        taken, step = time_roundtrip(args)
        print(f"round trip    EP64, 4096 tokens, top-{TOP_K}: {taken:.2f} s, predicts {step.total_us:.0f} us")
    print(
        f"memory        {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most, "
        f"including Python"
    )
    return int(not same)


def time_decode(args):
    """(seconds of the first step, seconds of the others, last Step, whether all predictions are equal)."""
    cluster = sim.Cluster(
        args.ranks,
        ranks_per_node=min(8, args.ranks),
        hidden=HIDDEN,
        num_experts=args.ranks,
        top_k=TOP_K,
        max_tokens=args.tokens,
        hardware=clusters.load(args.cluster).hardware,
        decode=True,
    )
    ids = routing(args.ranks, args.tokens, args.ranks)
    seconds, predicted = [], set()
    for _ in range(1 + args.steps):
        start = time.perf_counter()
        step = cluster.decode_step(ids)
        seconds.append(time.perf_counter() - start)
        predicted.add(step.dispatch_us.tobytes() + step.combine_us.tobytes())
    return seconds[0], seconds[1:], step, len(predicted) == 1


def time_roundtrip(args):
    """(seconds, Step) of a round trip on a new cluster."""
    cluster = sim.Cluster(
        64,
        ranks_per_node=8,
        hidden=HIDDEN,
        num_experts=256,
        top_k=TOP_K,
        max_tokens=4096,
        hardware=clusters.load(args.cluster).hardware,
    )
    ids = routing(64, 4096, 256)
    start = time.perf_counter()
    step = cluster.step(ids, quant="fp8")
    return time.perf_counter() - start, step


def routing(ranks, tokens, experts):
    """Uniform picks [ranks, tokens, TOP_K], deterministic."""
    return torch.rand(ranks, tokens, experts, generator=torch.Generator().manual_seed(0)).topk(TOP_K).indices
