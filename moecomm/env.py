"""Every environment variable that moecomm reads, with its default and meaning, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields


def _variable(name, default, meaning, convert=str):
    from dataclasses import field

    return field(default_factory=lambda: convert(os.environ.get(name, default)), metadata={"name": name, "default": default, "meaning": meaning})


def _flag(text):
    return text not in ("", "0", "false", "no")


@dataclass(frozen=True)
class Environment:
    """The MOECOMM_* variables, read when the object is made."""

    check: bool = _variable("MOECOMM_CHECK", "0", "1: a checksum travels with every row and is verified on arrival", _flag)
    rail: str = _variable("MOECOMM_RAIL", "auto", "between nodes: auto | ucx | loopback (rank threads only)")
    cuda_fabric: str = _variable("MOECOMM_CUDA_FABRIC", "auto", "between processes with GPUs: auto | ipc | nccl")
    channels: int = _variable("MOECOMM_CHANNELS", "0", "channels of a Buffer that names none; 0: chosen by the shape", int)
    populate: str = _variable("MOECOMM_POPULATE_BYTES", "268435456", "bytes of every window mapping whose pages are made ready at start")
    ucx_direct: bool = _variable("MOECOMM_UCX_DIRECT", "1", "0: UCX puts even where the peer's memory can be mapped (same host)", _flag)
    isa: str = _variable("MOECOMM_ISA", "best", "row kernels: avx512 | avx2 | base")


def describe():
    """(name, default, meaning) of every variable."""
    return [(f.metadata["name"], f.metadata["default"], f.metadata["meaning"]) for f in fields(Environment)]
