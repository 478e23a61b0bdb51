"""Every environment variable that moecomm reads, with its default and meaning, in one place."""

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
            raise InvalidArgument(f"{name}: got {text!r}; expected {meaning}", op="environment") from None

    return field(default_factory=read, metadata={"name": name, "default": default, "meaning": meaning})


def _flag(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _one_of(*names: str) -> Callable[[str], str]:
    return dict(zip(names, names, strict=True)).__getitem__


def _count(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


def _rows(text: str) -> str:
    if text not in (
        "best",
        core.isa(),
    ):  # chosen when the first row was moved, among those that the machine has
        raise ValueError
    return text


def _variant(text: str) -> str:
    if text not in ("measured", core.row_kernel_choice()[2]):  # as _rows
        raise ValueError
    return text


@dataclass(frozen=True)
class Environment:
    """The MOECOMM_* variables, read when the object is made."""

    check: bool = _variable(
        "MOECOMM_CHECK",
        "0",
        "1: a checksum travels with every row and is verified on arrival; 0: none",
        _flag,
    )
    rail: str = _variable(
        "MOECOMM_RAIL",
        "auto",
        "between nodes: auto | ucx | loopback (rank threads only)",
        _one_of("auto", "ucx", "loopback"),
    )
    cuda_fabric: str = _variable(
        "MOECOMM_CUDA_FABRIC",
        "auto",
        "between processes with GPUs: auto | ipc | nccl",
        _one_of("auto", "ipc", "nccl"),
    )
    channels: int = _variable(
        "MOECOMM_CHANNELS", "0", "channels of a Buffer that names none; 0: chosen by the shape", _count
    )
    populate: int = _variable(
        "MOECOMM_POPULATE_BYTES",
        "268435456",
        "bytes of every window mapping whose pages are made ready at start",
        _count,
    )
    ucx_direct: bool = _variable(
        "MOECOMM_UCX_DIRECT",
        "1",
        "0: UCX puts even where the peer's memory can be mapped (same host); 1: stores there",
        _flag,
    )
    group: str = _variable(
        "MOECOMM_GROUP",
        "auto",
        "whom Communicator() asks for its ranks: auto (refuses contradictions) | torch | env (RANK, WORLD_SIZE) | mpi | slurm | "
        "alone",
        _one_of("auto", "torch", "env", "mpi", "slurm", "alone"),
    )
    socket_ifname: str = _variable(
        "MOECOMM_SOCKET_IFNAME",
        "",
        "interface whose address ranks of other hosts connect to while objects are made; empty: GLOO_SOCKET_IFNAME, "
        "NCCL_SOCKET_IFNAME, or the one on the way to MASTER_ADDR",
        str,
    )
    isa: str = _variable(
        "MOECOMM_ISA", "best", "row kernels: avx512 | avx2 | base, as far as the machine has them", _rows
    )
    row_kernel: str = _variable(
        "MOECOMM_ROW_KERNEL",
        "measured",
        "variant of the row kernels that sum: one that `moecomm bench kernels` lists, such as avx2/1+next",
        _variant,
    )
    cache_dir: str = _variable(
        "MOECOMM_CACHE_DIR",
        "",
        "folder for what is measured once per CPU model; empty: moecomm in XDG_CACHE_HOME or ~/.cache",
        str,
    )


def describe() -> list[tuple[str, str, str]]:
    """(name, default, meaning) of every variable."""
    return [(f.metadata["name"], f.metadata["default"], f.metadata["meaning"]) for f in fields(Environment)]
