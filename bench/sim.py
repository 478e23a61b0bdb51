"""How long the simulator itself takes: real time of a decode step of EP320 and, on request, of a round trip
of EP64, on one core.
"""

from __future__ import annotations

import resource
import statistics
import time

import torch

from moecomm import clusters, options, sim

HIDDEN, TOP_K = 7168, 8


def arguments(parser):
    """Arguments of `python -m bench sim`."""
    parser.add_argument("--cluster", default="h800", help="table of the modelled hardware (default h800)")
    parser.add_argument(
        "--ranks",
        type=options.ranks,
        default=320,
        help="of the decode step, with one expert each (default 320)",
    )
    parser.add_argument(
        "--tokens", type=options.tokens, default=128, help="per rank, of the decode step (default 128)"
    )
    parser.add_argument(
        "--steps",
        type=options.positive,
        default=20,
        help="timed decode steps, after one that touches the memory (default 20)",
    )
    parser.add_argument(
        "--roundtrip", action="store_true", help="also a dispatch and combine of 64 ranks with 4096 tokens"
    )


def main(args):
    """Prints real seconds of a step beside what it predicts; 1 where steps of the same routing do not
    predict the same.
    """
    first, seconds, step, same = time_decode(args)
    print(
        f"decode step   EP{args.ranks}, {args.tokens} tokens, top-{TOP_K}: median "
        f"{statistics.median(seconds):.3f} s, quickest {min(seconds):.3f}, "
        f"slowest {max(seconds):.3f} of {len(seconds)}; the first {first:.2f}"
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
        f"Python's part included"
    )
    return int(not same)


def time_decode(args):
    """Seconds of the first step and of the others, the last Step, and whether all predicted the same."""
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
    """Seconds and the Step, of a cluster made for it."""
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
    """Uniform picks, the same every time: [ranks, tokens, TOP_K]."""
    return torch.rand(ranks, tokens, experts, generator=torch.Generator().manual_seed(0)).topk(TOP_K).indices
