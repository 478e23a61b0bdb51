"""record: round trips through a Buffer that records its calls, against the same without, interleaved."""

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
    """A case and the number of iterations."""
    cases.arguments(parser)


def main(args):
    """Print both medians, their ratio and the bytes written per step."""
    case = cases.from_args(args, "roundtrip")
    if not launch.launched():
        return launch.relaunch(case.ranks, sys.argv[1:])
    world = world_of(case.ranks)
    comm = moecomm.Communicator(world.group, ranks_per_node=case.ranks_per_node)
    inputs = make_inputs(case, comm.rank)
    with tempfile.TemporaryDirectory() as folder:
        folder = comm._exchange(folder)[0]   # rank 0's
        options = dict(hidden=case.hidden, num_experts=case.experts, top_k=case.top_k, max_tokens=case.tokens, dtype=TORCH_DTYPES[case.dtype])
        buf = moecomm.Buffer(comm, record=folder, **options)
        recorder = buf._recorder   # switched off and on: both contenders use the same memory
        times = {"plain": [], "recording": []}
        y = torch.empty_like(inputs.x)

        def step(recording):
            buf._recorder = recorder if recording else None
            out = buf.dispatch(inputs.x, inputs.ids, inputs.weights, layout=case.layout)
            buf.combine(out.handle.rows, out.handle, out=y)

        for i in range(args.warmup + args.iters):
            for name in sorted(times, reverse=i % 2 == 0):
                _, seconds = world.timed(lambda name=name: step(name == "recording"))
                if i >= args.warmup:
                    times[name].append(seconds)
        world.barrier()
        buf._recorder = recorder
        buf.close()
        if comm.rank == 0:
            written = sum(m.nbytes for rank in moecomm.record.load(folder)[:1] for m in [rank.calls, *rank.ids, *[w for w in rank.weights if w is not None]])
            ratios = np.array(times["recording"]) / np.array(times["plain"])
            print(f"# {case.title()}\n{'':12}{'median us':>12}{'p99 us':>12}")
            for name, seconds in times.items():
                print(f"{name:12}{1e6 * np.median(seconds):12.1f}{1e6 * np.percentile(seconds, 99):12.1f}")
            print(f"recording costs {100 * (np.median(ratios) - 1):+.2f}% of a step (median of {len(ratios)} pairs), "
                  f"{written / (args.warmup + args.iters) / 1024:.1f} KiB per step and rank")
        world.barrier()
    comm.close()
    return 0
