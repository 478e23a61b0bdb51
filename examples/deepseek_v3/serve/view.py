"""Live view of the units in a terminal. If the output is not a terminal, it prints a line every few seconds."""

from __future__ import annotations

import asyncio
import sys
import time

WIDTH = 24


def ms(value):
    """Format seconds as milliseconds."""
    return "     -" if value is None else f"{1e3 * value:6.0f}"


def lines(stats):
    """Format Router.stats() as lines of text."""
    r = stats["requests"]
    out = [
        f"requests   waiting {r['waiting']:4}   in prefill {r['prefill']:4}   in decode {r['decode']:4}   finished "
        f"{r['finished']:5}   lost {r['lost']}",
        f"tokens     {stats['tokens']:8}   {stats['tokens_per_second']:8.1f} per second",
    ]
    for name, text in (("ttft", "first token"), ("tpot", "per token  ")):
        p = stats[name]
        out.append(f"{text} p50 {ms(p['p50'])} ms   p90 {ms(p['p90'])} ms   p99 {ms(p['p99'])} ms")
    for name, unit in stats["units"].items():
        state = "" if unit["error"] is None else f"   FAILED: {unit['error']['type']}"
        draft = "" if unit["acceptance"] is None else f"   drafts accepted {100 * unit['acceptance']:.0f} %"
        out.append("")
        out.append(
            f"{name}: {unit['steps']} steps of {unit['batch']:.1f} {'tokens' if name == 'prefill' else 'sequences'}, "
            f"{len(unit['placements'])} placements{draft}{state}"
        )
        rows = unit["recent_rows_per_rank"]
        for rank, load in enumerate(rows):
            bar = round(WIDTH * load / max(*rows, 1e-9, key=float)) if max(rows) else 0
            out.append(f"  rank {rank} {'#' * bar:{WIDTH}} {load:7.1f} rows per step")
    return out


async def show(router, every=0.25, line_every=5.0):
    """Draw every `every` seconds until canceled, or print a line every `line_every` seconds without a terminal."""
    live, drawn = sys.stdout.isatty(), 0
    begin = last = time.monotonic()
    while True:
        await asyncio.sleep(every)
        now = time.monotonic()
        if live:
            text = lines(router.stats())
            sys.stdout.write(
                (f"\x1b[{drawn}F" if drawn else "") + "".join(f"\x1b[2K{line}\n" for line in text)
            )
            sys.stdout.flush()
            drawn = len(text)
        elif now - last > line_every:
            last, stats = now, router.stats()
            print(
                f"{now - begin:5.0f} s   finished {stats['requests']['finished']:5}   "
                f"{stats['tokens_per_second']:7.1f} "
                f"tokens/s   placements {[len(u['placements']) for u in stats['units'].values()]}",
                flush=True,
            )
