"""`python -m bench COMMAND`: each command is a module with arguments(parser) and main(args) -> exit status."""

import os
import subprocess
import sys
from pathlib import Path

if {"device", "tune"} & set(sys.argv[1:2]):
    # As cuda.prepare_threads(), but before anything initializes CUDA.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if "--build" in sys.argv:  # moecomm cannot be imported before the build
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
        "predictions of the sim world against published measurements of clusters",
    ),
    "sim": (f"{__package__}.sim", "run time of the simulator for a step of hundreds of ranks"),
    "dispatch": (f"{__package__}.run", "time to send tokens to the ranks of their experts"),
    "combine": (f"{__package__}.run", "time to send the experts' rows back and sum them"),
    "roundtrip": (f"{__package__}.run", "dispatch, combine and their sum"),
    "decode": (f"{__package__}.decode", "microseconds per decode step, its phases and its floor"),
    "fabric": (f"{__package__}.fabric", "writes, reads, multicasts and reductions, against MPI"),
    "suite": (f"{__package__}.suite", "all benchmarks of `make bench`"),
    "clients": (
        f"{__package__}.clients",
        "Megatron over the drop-in for deep_ep, against its own dispatchers",
    ),
    "compare": (f"{__package__}.compare", "whether this checkout is slower than a commit"),
    "ledger": (f"{__package__}.ledger", "results of all machines: add a run, write the tables of the docs"),
    "record": (f"{__package__}.record", "cost of recording the calls of a Buffer"),
    "overlap": (f"{__package__}.overlap", "two micro-batches, each computing while the other communicates"),
    "shaped-link": (f"{__package__}.shaped_link", "time against the speed of the link between nodes (root)"),
    "sweep": (f"{__package__}.sweep", "cost per row against tokens and ranks"),
    "balance": (
        f"{__package__}.balance",
        "placements of redundant experts, and the split of a batch over them",
    ),
    "elastic": (f"{__package__}.elastic", "seconds until the survivors of killed processes continue"),
    "precision": (
        f"{__package__}.precision",
        "error of every wire format on normal, outlier-heavy and real rows",
    ),
    "device": (f"{__package__}.device_run", "the cuda world on one GPU: build, check, time"),
    "kernels": (f"{__package__}.kernels", "time per row of every variant of the CPU row kernels"),
    "tune": (f"{__package__}.tune", "find the best launch plans for a GPU and write its table"),
    "quant": (f"{__package__}.quant", "quantization against operators of torch"),
}


def main(argv=None):
    """Run one command; return its exit status."""
    return run(PROGRAM, "Benchmarks of moecomm against alternatives.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
