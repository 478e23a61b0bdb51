"""Moves weights in the cpu world: each expert is multicast to the ranks that need it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..fabric import Domain, Multicast

_STAGE_BYTES = 16 << 20  # limit of the bytes that a rank receives in one round of multicasts
_ALIGNMENT = 64

Move = tuple[int, int, int]  # slot that gets an expert, the expert, slot that has it


@dataclass(frozen=True)
class Group:
    """One multicast of an expert: from a slot of the root to {rank: slot on that rank}."""

    root: int
    slot: int
    to: dict[int, int]


def grouped(moves: Sequence[Move], per_rank: int, ranks_per_node: int) -> list[Group]:
    """Group the moves of a layer between ranks into multicasts.

    A slot whose source is in its own node gets the expert from there; all others get it from one root.
    """
    multicasts: dict[tuple[int, int | None], tuple[int, dict[int, int]]] = {}
    for slot, expert, source in moves:
        to, root = slot // per_rank, source // per_rank
        if to == root:
            continue
        same_node = to // ranks_per_node == root // ranks_per_node
        _, receivers = multicasts.setdefault((expert, source if same_node else None), (source, {}))
        receivers[to] = slot % per_rank
    return [Group(source // per_rank, source % per_rank, to) for source, to in multicasts.values()]


class MulticastMover:
    """Moves the slots of one layer after the other. Construction is collective."""

    def __init__(self, comm: Any, slot_bytes: Sequence[int], per_rank: int) -> None:
        self.comm, self._per_rank = comm, per_rank
        self._bytes = min(_STAGE_BYTES, max(4096, 64 * max(slot_bytes)))
        self._domain = Domain(comm, self._bytes)
        self._stage = self._domain.tensor(self._bytes, torch.uint8)
        self._requests: list[Multicast] = []
        self._arrivals: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._used = 0

    def move(
        self, moves: Sequence[Move], old: Sequence[torch.Tensor], new: Sequence[torch.Tensor], layer: int
    ) -> None:
        """Copy experts from slots of the `old` tensors to slots of the `new` tensors of other ranks."""
        for group in grouped(moves, self._per_rank, self.comm.ranks_per_node):
            for before, after in zip(old, new):
                size = before[0].numel() * before.element_size()
                for begin, end in self._ranges(size):
                    self._add(group, before, after, begin, end)
        self._flush()

    def _ranges(self, size: int) -> Iterator[tuple[int, int]]:
        for begin in range(0, size, self._bytes):
            yield begin, min(begin + self._bytes, size)

    def _add(self, group: Group, before: torch.Tensor, after: torch.Tensor, begin: int, end: int) -> None:
        if self._used + end - begin > self._bytes:
            self._flush()
        place = self._stage[self._used : self._used + end - begin]
        self._used += -(-(end - begin) // _ALIGNMENT) * _ALIGNMENT
        me = self.comm.rank
        src = _bytes_of(before[group.slot])[begin:end] if me == group.root else None
        self._requests.append(Multicast(list(group.to), place, group.root, src))
        if me in group.to:
            self._arrivals.append((_bytes_of(after[group.to[me]])[begin:end], place))

    def _flush(self) -> None:
        """Execute one round. The next round begins when all ranks have copied the arrivals of this one."""
        if self._requests:
            self._domain.submit(self._requests)
        for place, stage in self._arrivals:
            place.copy_(stage)
        self._requests, self._arrivals, self._used = [], [], 0

    def finish(self) -> None:
        """Wait until all ranks have all their slots; a failure raises on all ranks."""
        me = self.comm.rank
        self._domain.submit([Multicast([], self._stage[:1], 0, self._stage[:1] if me == 0 else None)])

    def stats(self) -> dict[str, Any]:
        """As Domain.stats()."""
        return self._domain.stats()

    def close(self) -> None:
        """Release the memory."""
        self._domain.close()


def _bytes_of(slot: torch.Tensor) -> torch.Tensor:
    return slot.reshape(-1).view(torch.uint8)
