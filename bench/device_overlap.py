"""Part of `python -m bench device`: a GEMM concurrent with dispatch and combine."""

from __future__ import annotations

import statistics

import torch

import moecomm

from .device import Shape, World, arena_bytes, timed


def gemm_overlap(args, shape, sms=(16, 40), rounds=6):
    """Slowdown of a GEMM concurrent with dispatch and combine: {multiprocessors: slowdown}.

    Runs in which the GEMM takes longer than dispatch and combine are ignored.
    """
    a, b = (torch.randn((8192, 8192), device=args.device).bfloat16() for _ in range(2))
    alone = timed(lambda: torch.mm(a, b), 20)
    found = {}
    for total in sms:
        world = World(Shape(tokens=4096), 8, args.device)
        torch.cuda.synchronize()

        def rank(comm, total=total, world=world):
            buf = moecomm.Buffer(
                comm,
                hidden=shape.hidden,
                num_experts=shape.experts,
                top_k=shape.top_k,
                max_tokens=4096,
                num_sms=max(2, total // comm.size // 2 * 2),
                arena_bytes=arena_bytes(max(world.counts), shape),
            )
            times, side = [], torch.cuda.Stream(args.device)
            for _ in range(5):
                comm.barrier()
                for n in range(rounds):
                    out = buf.dispatch(
                        world.x[comm.rank],
                        world.ids[comm.rank],
                        world.weights[comm.rank],
                        capacity=max(world.counts),
                    )
                    if comm.rank == 0 and n == 0:
                        with torch.cuda.stream(side):
                            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                            begin.record()
                            torch.mm(a, b)
                            end.record()
                    buf.combine(out.handle.rows, out.handle)
                    del out
                last = torch.cuda.Event(enable_timing=True)
                last.record()
                last.synchronize()
                if comm.rank == 0 and end.elapsed_time(last) > 0:
                    times.append(begin.elapsed_time(end) / 1e3)
            buf.close()
            return statistics.median(times) if times else None

        beside = moecomm.run_local(rank, 8, ranks_per_node=8, device=args.device)[0]
        if beside is not None:
            found[total] = beside / alone
    return found
