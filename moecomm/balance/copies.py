"""Moves weights between GPUs that map each other's memory: by the copy engine, without a kernel.

The host orders the copies. A rank copies slots that others need into symmetric memory; when all ranks have done so, the
others copy them from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..fabric import Domain

if TYPE_CHECKING:
    from ..communicator import Communicator

_STAGE_BYTES = 16 << 20  # limit of the bytes that a rank offers in one round
_ALIGNMENT = 64

Piece = tuple[
    int, int, int, int, int
]  # slot of the source, tensor, first byte, last byte, place in the stage


class CopyMover:
    """Moves the slots of one layer after the other. Construction is collective."""

    def __init__(self, comm: Communicator, slot_bytes: Sequence[int], per_rank: int) -> None:
        self.comm, self._per_rank = comm, per_rank
        self._bytes = min(_STAGE_BYTES, max(4096, -(-max(slot_bytes) // _ALIGNMENT) * _ALIGNMENT))
        self._domain = Domain(comm, self._bytes, num_sms=1)
        self._stage = self._domain.tensor(self._bytes, torch.uint8)

    def move(
        self,
        moves: Sequence[tuple[int, int, int]],
        old: Sequence[torch.Tensor],
        new: Sequence[torch.Tensor],
        layer: int,
    ) -> None:
        """Copy experts from slots of the `old` tensors to slots of the `new` tensors of other ranks."""
        n, me = self._per_rank, self.comm.rank
        leaving: list[list[int]] = [[] for _ in range(self.comm.size)]  # by rank: its slots that others need
        wanted: dict[tuple[int, int], list[int]] = {}  # (rank, its slot): slots of this rank
        for slot, _, source in moves:
            root, receiver = source // n, slot // n
            if root == receiver:
                continue
            if source % n not in leaving[root]:
                leaving[root].append(source % n)
            if receiver == me:
                wanted.setdefault((root, source % n), []).append(slot % n)
        sizes = [t[0].numel() * t.element_size() for t in old]
        rounds = [list(self._rounds(slots, sizes)) for slots in leaving]
        for i in range(max(map(len, rounds))):
            for slot, t, begin, end, place in rounds[me][i] if i < len(rounds[me]) else ():
                self._stage[place : place + end - begin].copy_(_bytes_of(old[t][slot])[begin:end])
            self._meet()
            for root in range(self.comm.size):
                for slot, t, begin, end, place in rounds[root][i] if i < len(rounds[root]) else ():
                    for to in wanted.get((root, slot), ()):
                        self._domain.read(
                            root,
                            _bytes_of(new[t][to])[begin:end],
                            self._stage[place : place + end - begin],
                        )
            self._meet()  # then the stages may be written again

    def _rounds(self, slots: Sequence[int], sizes: Sequence[int]) -> Iterator[list[Piece]]:
        """The pieces of one rank's slots, as many as fit into its stage at a time. Equal on all ranks."""
        pieces: list[Piece] = []
        used = 0
        for slot in slots:
            for t, size in enumerate(sizes):
                for begin in range(0, size, self._bytes):
                    end = min(begin + self._bytes, size)
                    if used + end - begin > self._bytes:
                        yield pieces
                        pieces, used = [], 0
                    pieces.append((slot, t, begin, end, used))
                    used += -(-(end - begin) // _ALIGNMENT) * _ALIGNMENT
        if pieces:
            yield pieces

    def _meet(self) -> None:
        """Wait until the copies of all ranks are complete; a failure raises on all ranks."""
        torch.cuda.current_stream(self.comm.device).synchronize()
        self.comm.bootstrap.allgather(b"", "migrate")

    def finish(self) -> None:
        """Wait until all ranks have all their slots; a failure raises on all ranks."""
        self._meet()

    def stats(self) -> dict[str, Any]:
        """As Domain.stats()."""
        return self._domain.stats()

    def close(self) -> None:
        """Release the memory."""
        self._domain.close()


def _bytes_of(slot: torch.Tensor) -> torch.Tensor:
    return slot.reshape(-1).view(torch.uint8)
