"""overlap: two micro-batches through MoE layers, sequentially or with overlap of computation and communication.

Both ways alternate on fresh inputs, and their results must have equal bits. Communication is the time of the
sequential run in dispatch and combine. The hidden share is the part of it that the overlapped run saves.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np
import torch

import moecomm
from moecomm import options
from moecomm.nn import MoE
from moecomm.overlap import Started, Trace, moe_stages, two_batches

from . import launch
from .run import world_of


def arguments(parser):
    """Add the options of the command."""
    parser.add_argument(
        "--path", choices=("throughput", "decode"), default="throughput", help="path of dispatch and combine"
    )
    parser.add_argument("--nodes", type=options.ranks, default=1, help="number of nodes")
    parser.add_argument("--ranks-per-node", type=options.ranks, default=2, help="ranks per node")
    parser.add_argument(
        "--tokens",
        type=options.count,
        default=0,
        help="tokens per rank and micro-batch; 0: 512 (throughput), 32 (decode)",
    )
    parser.add_argument("--hidden", type=options.tokens, default=1024, help="elements of a token")
    parser.add_argument("--intermediate", type=options.tokens, default=256, help="elements inside an expert")
    parser.add_argument("--experts", type=options.ranks, default=16, help="experts over all ranks")
    parser.add_argument("--top-k", type=options.ranks, default=4, help="picks per token")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="float32",
        help="dtype; CPUs multiply float32 at full speed",
    )
    parser.add_argument("--layers", type=options.positive, default=3, help="number of layers")
    parser.add_argument("--threads", type=options.positive, default=1, help="threads of torch per rank")
    parser.add_argument("--iters", type=options.positive, default=20, help="timed iterations")
    parser.add_argument("--warmup", type=options.count, default=3, help="iterations before them")
    parser.add_argument("--json", type=options.file_to_write, default="", help="append a line to this file")
    parser.add_argument(
        "--trace",
        type=options.file_to_write,
        default="",
        help="write a Chrome/Perfetto trace of one overlapped run",
    )


def main(args):
    """Measure one case and print its row. The exit status is 1 if the results differ."""
    ranks = args.nodes * args.ranks_per_node
    if not launch.launched():
        return launch.relaunch(ranks, sys.argv[1:])
    args.tokens = args.tokens or (512 if args.path == "throughput" else 32)
    torch.set_num_threads(args.threads)
    world = world_of(ranks)
    with moecomm.Communicator(world.group, ranks_per_node=args.ranks_per_node) as comm, torch.no_grad():
        record = _measure(world, comm, args)
    if world.rank == 0:
        print(_row(record))
        if args.json:
            with open(args.json, "a") as file:
                print(json.dumps(record), file=file)
    return 1 if record["wrong"] else 0


def _measure(world, comm, args):
    buffer = moecomm.Buffer(
        comm,
        hidden=args.hidden,
        num_experts=args.experts,
        top_k=args.top_k,
        max_tokens=args.tokens,
        dtype=getattr(torch, args.dtype),
    )
    torch.manual_seed(comm.rank)
    layers = [
        MoE(args.hidden, args.intermediate, args.experts, args.top_k, 1, buffer) for _ in range(args.layers)
    ]
    attentions = [
        torch.nn.Linear(args.hidden, args.hidden, bias=False, dtype=buffer.dtype) for _ in range(args.layers)
    ]
    make = _decode_stages if args.path == "decode" else moe_stages
    stages = [
        stage for layer, attention in zip(layers, attentions, strict=True) for stage in make(layer, attention)
    ]
    times, wrong = {"sequential": [], "overlapped": [], "communication": []}, 0
    for i in range(args.warmup + args.iters):
        batches = [torch.randn(args.tokens, args.hidden).to(buffer.dtype) for _ in range(2)]
        results, communication = {}, []
        ways = {
            "sequential": lambda: _run_sequentially(stages, batches, communication),
            "overlapped": lambda: two_batches(stages, *batches),
        }
        for way in sorted(ways, reverse=bool(i % 2)):
            results[way], seconds = world.timed(ways[way])
            if i >= args.warmup:
                times[way].append(seconds)
        if i >= args.warmup:
            times["communication"].append(float(np.mean(world.allgather(sum(communication)))))
        wrong += sum(
            int((a.view(torch.int16) != b.view(torch.int16)).any(-1).sum())
            for a, b in zip(*results.values(), strict=True)
        )
    if args.trace:
        with Trace(buffer) as trace:
            two_batches(stages, *batches, trace=trace)
        trace.save(args.trace, comm)
    comm.barrier()
    medians = {f"{name}_us": round(1e6 * float(np.median(values)), 1) for name, values in times.items()}
    saved = np.array(times["sequential"]) - np.array(times["overlapped"])
    keys = (
        "path",
        "nodes",
        "ranks_per_node",
        "tokens",
        "hidden",
        "intermediate",
        "experts",
        "top_k",
        "dtype",
        "layers",
        "threads",
        "iters",
    )
    return {
        **{k: getattr(args, k) for k in keys},
        "cores": len(os.sched_getaffinity(0)),
        **medians,
        "hidden_share": round(float(np.median(saved / np.array(times["communication"]))), 3),
        "wrong": sum(world.allgather(wrong)),
    }


def _run_sequentially(stages, batches, communication):
    """Run the stages, wait for each communication immediately, and append its seconds to `communication`."""
    states = []
    for state in batches:
        for _, stage in stages:
            begin = time.perf_counter()
            result = stage(state)
            if hasattr(result, "wait"):
                state = result.wait()
                span = result.span or (begin, time.perf_counter())
                communication.append(span[1] - span[0])
            else:
                state = result
        states.append(state)
    return states


def _decode_stages(moe, attention):
    """Stages as in moe_stages, on the decode path. No moecomm code runs between a call and its hook."""
    buffer = moe.buffer

    def attend(x):
        return x + attention(x)

    def route(x):
        return (x, *moe.gate(x)[:2])

    def dispatch(state):
        received, hook = buffer.decode_dispatch(*state[:2], quant=None, return_hook=True)
        return Started(hook, lambda _: (*state, received))

    def experts(state):
        received = state[3]
        counts = received.counts.tolist()
        rows = torch.cat([received.x[e, :n] for e, n in enumerate(counts)])
        computed = moe.experts(rows, received.counts)
        for e, part in enumerate(computed.split(counts)):
            received.handle.rows[e, : len(part)] = part
        return state

    def combine(state):
        x, ids, weights, received = state
        y, hook = buffer.decode_combine(received.handle.rows, ids, weights, received.handle, return_hook=True)
        return Started(hook, lambda _: (x, y))

    def add(state):
        x, y = state
        return x + moe.shared_experts(x) + y

    return [(f.__name__, f) for f in (attend, route, dispatch, experts, combine, add)]


def _row(r):
    return (
        f"# {r['path']}: {r['nodes']}x{r['ranks_per_node']} ranks on {r['cores']} cores, {r['tokens']} "
        f"tokens of {r['hidden']} {r['dtype']} per rank and micro-batch, "
        f"{r['experts']} experts, top-{r['top_k']}, {r['layers']} layers\n"
        f"#{'sequential':>14}{'overlapped':>14}{'ratio':>8}{'communication':>16}{'hidden':>9}{'#wrong':>8}\n"
        f"#{'us':>14}{'us':>14}{'x':>8}{'us':>16}{'%':>9}\n"
        f" {r['sequential_us']:>14.1f}{r['overlapped_us']:>14.1f}"
        f"{r['sequential_us'] / r['overlapped_us']:>8.2f}{r['communication_us']:>16.1f}"
        f"{100 * r['hidden_share']:>9.1f}{r['wrong']:>8}"
    )
