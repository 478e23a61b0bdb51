"""Serves a small DeepSeek-V3. Run it in the root of the checkout:

python -m examples.deepseek_v3.serve bench              serve, load, compare with one process; write results.json
python -m examples.deepseek_v3.serve http --port 8000   serve OpenAI clients until Ctrl-C; page at /
python -m examples.deepseek_v3.serve load --url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import sys
from dataclasses import replace
from pydoc_data.topics import topics

import torch

from moecomm import MoecommError

from ..config import MINI, TINY
from .config import DTYPES, ServeConfig, UnitShape
from .model import trained
from .text import load_tokenizer

SIZES = {"tiny": replace(TINY, vocab_size=256), "mini": MINI}  # at least 256 ids, one per byte


def arguments(words=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.deepseek_v3.serve", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    server, client = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    server.add_argument(
        "--model",
        default="mini",
        help="tiny or mini, with random parameters; or the folder of `make v3-train`",
    )
    for unit, shape in (("prefill", "4x2"), ("decode", "4x2")):
        server.add_argument(
            f"--{unit}",
            type=shape_of,
            default=shape_of(shape),
            metavar="RANKSxPER_NODE+REDUNDANT/TP",
            help=f"ranks, ranks per node, redundant expert slots per rank, and ranks that share the attention of "
            f"a sequence; default: {shape}+1/1",
        )
    server.add_argument("--slots", type=int, default=8, help="sequences per decode rank or group")
    server.add_argument("--max-len", type=int, default=160, help="tokens of a sequence, including the prompt")
    server.add_argument(
        "--rebalance-seconds", type=float, default=3.0, help="time between placements; 0: never rebalance"
    )
    server.add_argument("--no-speculation", action="store_true", help="one token per step, without MTP")
    server.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float64", help="of the model and its rows"
    )
    server.add_argument("--seed", type=int, default=0, help="seed of random parameters")
    server.add_argument("--timeout", type=float, default=60.0, help="timeout of every wait, in seconds")
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--tokenizer", help="JSON file of a trained tokenizer; default: bytes")
    client.add_argument("--requests", type=int, default=96, help="number of requests")
    client.add_argument("--rate", type=float, default=4.0, help="requests per second")
    client.add_argument("--prompt", type=int, default=64, help="maximum tokens of a prompt")
    client.add_argument("--tokens", type=int, default=32, help="maximum tokens of an answer")
    http = commands.add_parser("http", parents=[server, both], help="serve")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on")
    http.add_argument("--port", type=int, default=8000, help="port to listen on")
    load = commands.add_parser("load", parents=[client, both], help="load a running server")
    load.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
    bench = commands.add_parser("bench", parents=[server, client, both], help="serve, load and compare")
    bench.add_argument("--out", default="results.json", help="file to write")
    return parser.parse_args(words)


def shape_of(text):
    """Parse RANKSxPER_NODE+REDUNDANT/TP to a UnitShape. Defaults: one node, one redundant slot, no TP."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?(?:\+(\d+))?(?:/(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected RANKSxPER_NODE+REDUNDANT/TP, for example 4x2+1/2"
        )
    ranks, per_node, redundant, tp = found.groups()
    return UnitShape(
        int(ranks), int(per_node or ranks), 1 if redundant is None else int(redundant), int(tp or 1)
    )


def config_of(args):
    """Make the ServeConfig of the command line."""
    checkpoint = None
    if args.model in SIZES:
        model = SIZES[args.model]
    else:
        model, checkpoint, tokenizer = trained(args.model)
        args.tokenizer = args.tokenizer or tokenizer
    return ServeConfig(
        model=model,
        prefill=args.prefill,
        decode=args.decode,
        slots=args.slots,
        max_len=args.max_len,
        prefill_tokens=max(256, args.max_len),
        speculative=not args.no_speculation,
        rebalance_seconds=args.rebalance_seconds,
        dtype=args.dtype,
        seed=args.seed,
        checkpoint=checkpoint,
        timeout=args.timeout,
    )


async def serve_http(args):
    """Serve until Ctrl-C."""
    from .endpoint import Endpoint
    from .launch import serving
    from .view import show

    config = config_of(args)
    async with serving(config) as router:
        endpoint = Endpoint(router, load_tokenizer(args.tokenizer))
        async with endpoint.listening(args.host, args.port) as port:
            print(
                f"OpenAI clients: http://{args.host}:{port}/v1   page: http://{args.host}:{port}/", flush=True
            )
            await show(router)


async def load_server(args):
    """Load a server and print the measurements of the clients."""
    from . import load

    work = _work(args, load_tokenizer(args.tokenizer))
    found = load.summary(await load.run(args.url, work, args.rate))
    print(json.dumps(found, indent=1))
    return 0 if found["failed"] == found["lost_tokens"] == 0 else 1


async def bench(args):
    """Serve, load, compare every token with the result of one process, and write the results."""
    from . import load
    from .endpoint import Endpoint
    from .launch import serving
    from .results import collect, table
    from .view import show

    config, tokenizer = config_of(args), load_tokenizer(args.tokenizer)
    async with serving(config) as router:
        endpoint = Endpoint(router, tokenizer)
        async with endpoint.listening() as port:
            drawing = asyncio.ensure_future(show(router))
            try:
                samples = await load.run(f"http://127.0.0.1:{port}", _work(args, tokenizer), args.rate)
            finally:
                drawing.cancel()
            stats = router.stats()
    found = collect(config, samples, load.summary(samples), stats)
    with open(args.out, "w") as file:
        json.dump(found, file, indent=1)
    print(table(found))
    print(f"written: {args.out}")
    wrong = found["mismatched_tokens"] or found["lost_tokens"] or found["failed"]
    return 1 if wrong and args.dtype == "float64" else 0


def _work(args, tokenizer):
    from . import load

    texts = [topics[name] for name in sorted(topics)]
    return load.prompts(texts, tokenizer, args.requests, args.prompt, args.tokens, seed=1)


def main(words=None):
    """Run one command; return the exit status."""
    args = arguments(words)
    torch.set_num_threads(1)  # leave the other cores to the ranks
    run = {"http": serve_http, "load": load_server, "bench": bench}[args.command]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            return asyncio.run(run(args)) or 0
    except (MoecommError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
