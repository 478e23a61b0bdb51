"""`python -m bench COMMAND`: each command is a module with arguments(parser) and main(args) -> exit status."""

import os
import subprocess
import sys
from pathlib import Path

if {"device", "tune"} & set(sys.argv[1:2]):
    os.environ.setdefault(
        "CUDA_DEVICE_MAX_CONNECTIONS", "32"
    )  # cuda.prepare_threads(), before anything can have asked for a GPU
    if "--build" in sys.argv:  # moecomm cannot be imported before
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            check=True,
            cwd=Path(__file__).resolve().parent.parent,
        )

from moecomm.__main__ import run

PROGRAM = "python -m bench" if __package__ == "bench" else "moecomm bench"
COMMANDS = {
    "published": (
        f"{__package__}.published",
        "the sim world's predictions against published measurements of clusters",
    ),
    "sim": (f"{__package__}.sim", "how long the simulator itself takes for a step of hundreds of ranks"),
    "dispatch": (f"{__package__}.run", "tokens to the ranks of their experts"),
    "combine": (f"{__package__}.run", "the experts' rows back, and summed"),
    "roundtrip": (f"{__package__}.run", "both, and their sum"),
    "decode": (f"{__package__}.decode", "microseconds per decode step, its phases and its floor"),
    "suite": (f"{__package__}.suite", "what `make bench` runs"),
    "record": (f"{__package__}.record", "what recording a Buffer's calls costs"),
    "overlap": (f"{__package__}.overlap", "two micro-batches, each computing while the other communicates"),
    "shaped-link": (f"{__package__}.shaped_link", "time against the speed of the link between nodes (root)"),
    "sweep": (f"{__package__}.sweep", "cost per row against tokens and ranks"),
    "balance": (
        f"{__package__}.balance",
        "plans for redundant experts, and the split of a batch's tokens over them",
    ),
    "precision": (
        f"{__package__}.precision",
        "error of every wire format on normal, outlier-heavy and real rows",
    ),
    "device": (f"{__package__}.device_run", "the cuda world on one GPU: build, check, time"),
    "kernels": (f"{__package__}.kernels", "time per row of every variant of the CPU's row kernels"),
    "tune": (f"{__package__}.tune", "the best spread over a GPU, written to its table"),
    "quant": (f"{__package__}.quant", "quantization against torch's own operators"),
}


def main(argv=None):
    """Run one command; returns its exit status."""
    return run(PROGRAM, "moecomm against what a user would pick instead", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
