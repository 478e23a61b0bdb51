"""`python -m bench COMMAND`: each command is a module with arguments(parser) and main(args) -> exit status."""

import sys

from moecomm.__main__ import run

COMMANDS = {
    "published": ("bench.published", "the sim world's predictions against published measurements of clusters"),
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
    "device": ("bench.device", "the cuda world on one GPU: build, check, time"),
    "tune": ("bench.tune", "the best spread over a GPU, written to its table"),
    "quant": ("bench.quant", "quantization against torch's own operators"),
}


def main(argv=None):
    """Run one command; returns its exit status."""
    return run("python -m bench", "moecomm against what a user would pick instead", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
