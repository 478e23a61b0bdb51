"""record: round trips with and without recording the calls of a Buffer, interleaved."""

from __future__ import annotations

import sys
import tempfile

import numpy as np
import torch

import moecomm

from . import cases, launch
from .routing import TORCH_DTYPES, make_inputs
from .run import world_of


def arguments(parser):
    """Add the options of the command."""
    cases.arguments(parser)
    parser.set_defaults(iters=300)  # the cost is smaller than the noise of a few iterations


def cost_of(seconds, plain):
    """Cost in percent, from the median of the ratios of adjacent times, and its 95% interval (bootstrap)."""
    ratios = np.array(seconds) / np.array(plain)
    medians = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    return tuple(100 * (np.array([np.median(ratios), *np.percentile(medians, [2.5, 97.5])]) - 1))


def main(args):
    """Print medians, the cost of recording, the cost of a second run without it (noise), and bytes written per step."""
    case = cases.from_args(args, "roundtrip")
    if not launch.launched():
        return launch.relaunch(case.ranks, sys.argv[1:])
    world = world_of(case.ranks)
    comm = moecomm.Communicator(world.group, ranks_per_node=case.ranks_per_node)
    inputs = make_inputs(case, comm.rank)
    with tempfile.TemporaryDirectory() as folder:
        folder = comm.exchange(folder)[0]  # the folder of rank 0
        options = dict(
            hidden=case.hidden,
            num_experts=case.experts,
            top_k=case.top_k,
            max_tokens=case.tokens,
            dtype=TORCH_DTYPES[case.dtype],
        )
        buf = moecomm.Buffer(comm, record=folder, **options)
        times = {"plain": [], "plain again": [], "recording": []}
        y = torch.empty_like(inputs.x)

        def step(recording):
            buf.backend.recorder.record(recording)  # all contenders use the same memory
            out = buf.dispatch(inputs.x, inputs.ids, inputs.weights, layout=case.layout)
            buf.combine(out.handle.rows, out.handle, out=y)

        for i in range(args.warmup + args.iters):
            names = list(times)[i % 3 :] + list(times)[: i % 3]
            for name in names if i % 2 else reversed(names):
                _, seconds = world.timed(lambda name=name: step(name == "recording"))
                if i >= args.warmup:
                    times[name].append(seconds)
        world.barrier()
        buf.close()
        world.barrier()  # all ranks have written
        if comm.rank == 0:
            written = sum(
                m.nbytes
                for rank in moecomm.record.load(folder)[:1]
                for m in [rank.calls, *rank.ids, *[w for w in rank.weights if w is not None]]
            )
            print(
                f"# {case.title()}\n{'':12}{'median us':>12}{'p99 us':>12}{'of a step':>12}{'95% interval':>20}"
            )
            for name, seconds in times.items():
                cost, low, high = cost_of(seconds, times["plain"])
                print(
                    f"{name:12}{1e6 * np.median(seconds):12.1f}{1e6 * np.percentile(seconds, 99):12.1f}"
                    + (f"{cost:+11.2f}%{low:+10.2f} ..{high:+6.2f}%" if name != "plain" else "")
                )
            print(
                f"{args.iters} triples; {written / (args.warmup + args.iters) / 1024:.1f} KiB per step and rank"
            )
        world.barrier()
    comm.close()
    return 0
