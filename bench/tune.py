"""`python -m bench tune`: measures launch plans on this GPU and writes the table of the best ones for choose_plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from moecomm import cuda, options, tuning

from . import device, device_run

WARPS = (4, 6, 8, 12)
PIECES = (1, 2, 3, 4)  # parts of a row; each part is a stage


def arguments(parser):
    """Add the options of `bench device` and of this command."""
    device_run.arguments(parser)
    parser.add_argument(
        "--sms", type=options.positive, nargs="+", default=[20], help="multiprocessors per rank"
    )
    parser.add_argument(
        "--table", type=options.folder_to_write, default=str(tuning.TABLES), help="folder for the table"
    )


def main(args):
    """Measure all candidates and keep the fastest. The exit status is 2 without a GPU."""
    if not device_run.ready(args):
        return 2
    torch.cuda.set_device(args.device)
    shape, plans = device.Shape(tokens=args.tokens), {}
    name = torch.cuda.get_device_name()
    shared_bytes, all_sms = cuda.native().device_limits()
    for nodes, per_node in device.GEOMETRIES:
        for sms in args.sms:
            traffic = traffic_of(shape, nodes, per_node)
            times = {}
            for plan in candidates(tuning.hardware_of(name, all_sms, shared_bytes), traffic, sms):
                rows = device.measure(
                    args, shape, nodes, per_node, sms * nodes * per_node, 1.0, lambda *_: plan
                )
                if not any(r["wrong"] for r in rows):
                    times[plan] = sum(r["us"] for r in rows)
                print(f"{nodes}x{per_node} {plan}: {times.get(plan, float('nan')):.1f} us")
            plans[tuning.key_of(traffic, sms)] = min(times, key=times.get)
    print(f"wrote {tuning.save_table(name, {**tuning.load_table(name), **plans}, Path(args.table))}")
    return 0


def traffic_of(shape, nodes, per_node):
    """tuning.Traffic of a shape of the benchmark, as a Buffer makes it."""
    return tuning.Traffic(
        hidden=shape.hidden,
        num_experts=shape.experts,
        top_k=shape.top_k,
        max_tokens=shape.tokens,
        ranks=nodes * per_node,
        ranks_per_node=per_node,
        row_bytes=2 * shape.hidden,
        shared_gpu=nodes * per_node,
    )


def candidates(hardware, traffic, num_sms):
    """Launch plans to measure: the chosen one, and others with different warps, stages and chunks that fit the GPU."""
    chosen = tuning.choose_plan(hardware, traffic, num_sms)
    found = [chosen]
    if traffic.nodes > 1:
        found += [
            replace(chosen, chunk_bytes=max(traffic.row_bytes, n))
            for n in (chosen.chunk_bytes // 4, chosen.chunk_bytes * 4)
        ]
    for warps in WARPS:
        for pieces in PIECES:
            stage = -(-traffic.row_bytes // pieces // 128) * 128
            if not tuning.fits(hardware, warps, stage):
                continue
            workers = num_sms * warps - 1
            senders = (
                0
                if traffic.nodes == 1
                else max(1, workers * chosen.senders // (chosen.num_sms * chosen.warps - 1))
            )
            channels = max(1, min(1024, senders or workers, -(-traffic.max_tokens // 4)))
            stages = 4 if tuning.fits(hardware, warps, stage, 4) else 3
            found.append(
                replace(
                    chosen, warps=warps, stage_bytes=stage, stages=stages, senders=senders, channels=channels
                )
            )
    return list(dict.fromkeys(found))
