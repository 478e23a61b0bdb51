"""All environment variables that moecomm reads, with defaults and meanings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ._native import core
from .errors import InvalidArgument


def _variable(name: str, default: str, meaning: str, convert: Callable[[str], Any]) -> Any:
    def read() -> Any:
        text = os.environ.get(name, default)
        try:
            return convert(text)
        except (KeyError, ValueError):
            raise InvalidArgument(f"{name} is {text!r}; expected {meaning}", op="environment") from None

    return field(default_factory=read, metadata={"name": name, "default": default, "meaning": meaning})


def _flag(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _one_of(*names: str) -> Callable[[str], str]:
    return dict(zip(names, names, strict=True)).__getitem__


def _count(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


LONGEST_TIMEOUT = 10_000_000  # in seconds; every wait is bounded


def _seconds(text: str) -> float:
    if not 0 < float(text) <= LONGEST_TIMEOUT:
        raise ValueError
    return float(text)


def _rows(text: str) -> str:
    # core.isa() is the choice that native code made from this variable; it differs if the machine lacks the kernels.
    if text not in ("best", core.isa()):
        raise ValueError
    return text


def _variant(text: str) -> str:
    if text not in ("measured", core.row_kernel_choice()[2]):  # see _rows
        raise ValueError
    return text


@dataclass(frozen=True)
class Environment:
    """The MOECOMM_* variables. They are read when the object is made."""

    check: bool = _variable(
        "MOECOMM_CHECK",
        "0",
        "1: every row has a checksum, which its receiver verifies; 0: no checksums",
        _flag,
    )
    rail: str = _variable(
        "MOECOMM_RAIL",
        "auto",
        "transport between nodes: auto | ucx | loopback (rank threads only)",
        _one_of("auto", "ucx", "loopback"),
    )
    cuda_fabric: str = _variable(
        "MOECOMM_CUDA_FABRIC",
        "auto",
        "transport between processes with GPUs: auto | ipc | nccl",
        _one_of("auto", "ipc", "nccl"),
    )
    channels: int = _variable(
        "MOECOMM_CHANNELS", "0", "default number of channels of a Buffer; 0: chosen from the shape", _count
    )
    populate: int = _variable(
        "MOECOMM_POPULATE_BYTES",
        "268435456",
        "bytes of arenas whose pages are populated when Buffers are made, for all Buffers of a communicator together",
        _count,
    )
    ucx_direct: bool = _variable(
        "MOECOMM_UCX_DIRECT",
        "1",
        "1: store to memory of peers on the same host directly; 0: use UCX puts there, too",
        _flag,
    )
    timeout: float = _variable(
        "MOECOMM_TIMEOUT",
        "120",
        "default timeout of a wait in seconds; at most 10000000",
        _seconds,
    )
    group: str = _variable(
        "MOECOMM_GROUP",
        "auto",
        "where Communicator() gets its ranks from: auto (refuses contradictions) | torch | env (RANK, WORLD_SIZE) | "
        "mpi | slurm | alone",
        _one_of("auto", "torch", "env", "mpi", "slurm", "alone"),
    )
    socket_ifname: str = _variable(
        "MOECOMM_SOCKET_IFNAME",
        "",
        "network interface to which ranks of other hosts connect while objects are made; empty: GLOO_SOCKET_IFNAME, "
        "NCCL_SOCKET_IFNAME, or the interface with the route to MASTER_ADDR",
        str,
    )
    isa: str = _variable(
        "MOECOMM_ISA",
        "best",
        "instruction set of the row kernels: best, or avx512 | avx2 | base if supported",
        _rows,
    )
    row_kernel: str = _variable(
        "MOECOMM_ROW_KERNEL",
        "measured",
        "variant of the summing row kernels: measured, or one that `moecomm bench kernels` lists, such as avx2/1+next",
        _variant,
    )
    cache_dir: str = _variable(
        "MOECOMM_CACHE_DIR",
        "",
        "folder for measurements that are made once per CPU model; empty: moecomm in XDG_CACHE_HOME or ~/.cache",
        str,
    )


def describe() -> list[tuple[str, str, str]]:
    """List (name, default, meaning) of all variables."""
    return [(f.metadata["name"], f.metadata["default"], f.metadata["meaning"]) for f in fields(Environment)]
