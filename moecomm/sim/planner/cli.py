"""`python -m moecomm plan`: runs the planner, prints the result and writes the HTML page."""

from __future__ import annotations

from typing import Any
import argparse

import json
import sys
from pathlib import Path

from ... import options
from . import report
from .question import ask
from .sweeps import make_plan


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("--model", default="deepseek-v3", help="name of a shape in moecomm.presets")
    add("--cluster", default="h800", help="name of a table in moecomm.clusters, or a .toml file")
    add("--ep", type=options.ranks, default=320, help="number of ranks")
    add("--tokens", type=options.tokens, default=128, help="tokens per rank and micro-batch")
    add(
        "--routing",
        type=options.source("uniform", "zipf"),
        default="uniform",
        help="uniform, zipf, or the folder of a recording",
    )
    add(
        "--path",
        choices=("auto", "decode", "throughput"),
        default="auto",
        help="auto: decode up to 256 tokens per rank",
    )
    add(
        "--dispatch",
        choices=("fp8", "bf16"),
        default="fp8",
        help="format of dispatch's rows; combine sends bf16",
    )
    add("--sms", type=options.positive, default=20, help="multiprocessors per rank")
    add(
        "--node-limit",
        type=options.positive,
        help="number of groups from which the experts of a token come; default: the model's",
    )
    add(
        "--slots-per-rank",
        type=options.ranks,
        help="expert slots per rank; default: as in the published deployment, else the minimum",
    )
    add("--layers", type=options.positive, default=61, help="MoE layers of the model")
    add("--slo-ms", type=options.above_zero, help="limit of a step; print how many tokens fit into it")
    add(
        "--attention-us",
        type=options.above_zero,
        help="computation of one micro-batch; print the share of communication that it hides",
    )
    add("--quick", action="store_true", help="no sweeps")
    add("--html", type=options.file_to_write, metavar="FILE", help="HTML page to write")
    add("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Run the planner and print its result."""
    question = ask(
        args.model,
        args.cluster,
        args.ep,
        args.tokens,
        routing=args.routing,
        decode=None if args.path == "auto" else args.path == "decode",
        quant=None if args.dispatch == "bf16" else "fp8",
        num_sms=args.sms,
        top_groups=args.node_limit,
        slots_per_rank=args.slots_per_rank,
    )

    def progress(done: Any, of: Any, what: str) -> None:
        if sys.stderr.isatty():
            bar = "#" * (30 * done // of)
            print(
                f"\r\033[K[{bar:30}] {done}/{of} {what}" if done < of else "\r\033[K",
                end="",
                file=sys.stderr,
                flush=True,
            )

    chosen = dict(sweeps=()) if args.quick else {}
    plan = make_plan(
        question,
        layers=args.layers,
        slo_ms=args.slo_ms,
        attention_us=args.attention_us,
        progress=progress,
        **chosen,
    )
    print(json.dumps(report.as_dict(plan), indent=1) if args.json else report.text(plan))
    if args.html:
        Path(args.html).write_text(report.page(plan))
        if not args.json:
            print(f"\nwrote {args.html}")
    return 0
