"""`python -m bench COMMAND`: each command is a module with arguments(parser) and main(args) -> exit status."""

import os
import subprocess
import sys
from pathlib import Path

if {"device", "tune"} & set(sys.argv[1:2]):
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")   # cuda.prepare_threads(), before anything can have asked for a GPU
    if "--build" in sys.argv:   # moecomm cannot be imported before
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], check=True, cwd=Path(__file__).resolve().parent.parent)

from moecomm.__main__ import run  # noqa: E402 - see above

COMMANDS = {
    "published": ("bench.published", "the sim world's predictions against published measurements of clusters"),
    "sim": ("bench.sim", "how long the simulator itself takes for a step of hundreds of ranks"),
    "dispatch": ("bench.run", "tokens to the ranks of their experts"),
    "combine": ("bench.run", "the experts' rows back, and summed"),
    "roundtrip": ("bench.run", "both, and their sum"),
    "decode": ("bench.decode", "microseconds per decode step, its phases and its floor"),
    "suite": ("bench.suite", "what `make bench` runs"),
    "record": ("bench.record", "what recording a Buffer's calls costs"),
    "overlap": ("bench.overlap", "two micro-batches, each computing while the other communicates"),
    "shaped-link": ("bench.shaped_link", "time against the speed of the link between nodes (root)"),
    "sweep": ("bench.sweep", "cost per row against tokens and ranks"),
    "balance": ("bench.balance", "plans for redundant experts, and the split of a batch's tokens over them"),
    "precision": ("bench.precision", "error of every wire format on normal, outlier-heavy and real rows"),
    "device": ("bench.device_run", "the cuda world on one GPU: build, check, time"),
    "tune": ("bench.tune", "the best spread over a GPU, written to its table"),
    "quant": ("bench.quant", "quantization against torch's own operators"),
}


def main(argv=None):
    """Run one command; returns its exit status."""
    return run("python -m bench", "moecomm against what a user would pick instead", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
