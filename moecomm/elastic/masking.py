"""Masks: the decode path of a Buffer goes on without dead ranks, in the same windows and CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .._bootstrap.encoding import decode, encode
from ..errors import ConfigMismatch, InvalidArgument
from ._rank_lists import ranks_of

if TYPE_CHECKING:
    from ..backend import Backend
    from ..communicator import Communicator

_ENDS = 1000  # milliseconds between the end of a rank's calls or connections and the end of the rank


def mask(backend: Backend, ranks: Iterable[int]) -> None:
    """See Buffer.mask.

    Raises
    ------
    MoecommError
    """
    memory = backend.memory
    comm = memory.comm
    memory.require_open("mask")
    comm.order.settle()
    _require_maskable(backend)
    masked = _checked(comm, ranks, memory.decode.masked)
    left = [r for r in range(comm.size) if r not in masked]
    dead = [r for r in masked if _is_dead(comm, r)]
    if comm.native.broken() is None and dead == masked:
        comm.native.leave_calls(masked[0])  # end the waits of other ranks for this one
    boot = comm.bootstrap.subset(left)
    try:
        _go_on(comm, memory.decode, boot, left, masked, dead)
    finally:
        boot.close()


def _go_on(
    comm: Communicator, made: Any, boot: Any, left: list[int], masked: list[int], dead: list[int]
) -> None:
    latest, calls = made.native.rest()
    mine = [masked, dead, latest, calls]
    everyone = [decode(said) for said in boot.allgather(encode(mine), "mask")]  # no step is running now
    for rank, said in zip(left, everyone, strict=True):
        if said[0] != masked:
            raise ConfigMismatch(
                f"mask: ranks are {said[0]} on rank {rank} and {masked} on rank {comm.rank}; expected the same "
                "ranks everywhere",
                op="mask",
                rank=comm.rank,
                peer=rank,
                expected=masked,
                got=said[0],
            )
    alive = [r for r in masked if not any(r in said[1] for said in everyone)]
    if alive:
        raise InvalidArgument(
            f"mask: no rank knows that rank {alive[0]} is dead; expected ranks whose process has ended (one that is "
            "only stopped could still write where other ranks write now: kill it first)",
            op="mask",
            rank=comm.rank,
            peer=alive[0],
        )
    table = [int(r in masked) for r in range(comm.size)]
    made.native.mask(table, max(said[2] for said in everyone), max(said[3] for said in everyone))
    made.masked = tuple(masked)
    made.gone.view(comm.size, -1)[masked] = True
    comm.native.lose(masked[0])
    if comm.gpu_calls is not None:
        comm.gpu_calls.go_on(made.native)
    boot.allgather(b"", "mask")  # no rank begins a step before all ranks have masked the same ones


def _require_maskable(backend: Backend) -> None:
    memory = backend.memory
    comm = memory.comm
    why = None
    if memory.decode is None:
        why = "there was no decode_dispatch; expected a buffer that has used its decode path (others go on by shrink)"
    elif backend.router is not None:
        why = "the buffer has a placement; expected one without (one with a placement goes on by elastic or shrink)"
    elif backend.recorder is not None or backend.gpu_recorder is not None:
        why = "the buffer has record=; expected one without"
    elif comm.gpu is not None and torch.cuda.is_current_stream_capturing():
        why = "a CUDA graph is captured on the current stream; expected mask between two replays"
    elif comm.rail not in ("none", "loopback") or not comm.maps_peers:
        why = (
            "ranks reach each other by UCX or NCCL, whose connections a failure ends; expected ranks that map each "
            "other's memory (others go on by elastic or shrink)"
        )
    if why is not None:
        raise InvalidArgument(f"mask: {why}", op="mask", rank=comm.rank)


def _checked(comm: Communicator, ranks: Iterable[int], before: tuple[int, ...]) -> list[int]:
    expected = f"other ranks than {comm.rank} of 0..{comm.size - 1}"
    given = ranks_of(
        comm, "mask", "ranks", ranks, lambda other: bool(other) and comm.rank not in other, expected
    )
    return sorted({*given, *before})


def _is_dead(comm: Communicator, rank: int) -> bool:
    if comm.bootstrap.threads:
        return bool(comm.bootstrap.has_ended(rank, _ENDS / 1000))
    return bool(comm.native.has_ended(rank, _ENDS))
