"""Moves weights on a GPU: the bytes of a slot become rows of a dispatch, whose only pick is the receiving rank.

Rows of one source arrive in the order in which they were sent, so they need no metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..buffer import Buffer

if TYPE_CHECKING:
    from ..communicator import Communicator

_ROW_BYTES = 1 << 16
_ROWS_PER_ROUND = 128  # per source; a small number keeps the window small


class RowMover:
    """Moves the slots of one layer after the other. Construction is collective."""

    def __init__(self, comm: Communicator, slot_bytes: list[int], per_rank: int) -> None:
        self.comm, self._slot_bytes, self._per_rank, self._rank = comm, slot_bytes, per_rank, comm.rank
        self._row_bytes = min(_ROW_BYTES, max(16, -(-max(slot_bytes) // 16) * 16))
        self._buffer = Buffer(
            comm,
            hidden=self._row_bytes // 4,
            num_experts=comm.size,
            top_k=1,
            max_tokens=_ROWS_PER_ROUND,
            dtype=torch.float32,
            num_sms=2,
        )

    def move(self, moves: Any, old: Sequence[torch.Tensor], new: Sequence[torch.Tensor], layer: int) -> None:
        """Copy experts from slots of the `old` tensors to slots of the `new` tensors of other ranks."""
        n = self._per_rank
        remote = [(source // n, slot // n, source % n, slot % n) for slot, _, source in moves]
        remote = [m for m in remote if m[0] != m[1]]
        rows_per_slot = -(-self._slot_bytes[layer] // self._row_bytes)
        leaving = [m for m in remote if m[0] == self._rank]
        most = max((sum(m[0] == r for m in remote) for r in range(self.comm.size)), default=0) * rows_per_slot
        pieces: dict[Any, list[torch.Tensor]] = {m: [] for m in remote if m[1] == self._rank}
        expected = {
            r: [m for m in pieces if m[0] == r for _ in range(rows_per_slot)] for r in range(self.comm.size)
        }
        for first in range(0, most, _ROWS_PER_ROUND):
            rows, to = self._cut(old, leaving, rows_per_slot, first)
            for source, row in self._dispatch(rows, to):
                pieces[expected[source].pop(0)].append(row)
        for (_, _, _, slot), parts in pieces.items():
            self._paste(torch.cat(parts), [t[slot] for t in new])

    def finish(self) -> None:
        """Wait until all ranks have all their slots; a failure raises on all ranks."""
        self._dispatch(self._no_rows(), [])

    def stats(self) -> dict[str, Any]:
        """As Buffer.stats()."""
        return self._buffer.stats()

    def close(self) -> None:
        """Release the memory."""
        self._buffer.close()

    def _no_rows(self) -> torch.Tensor:
        return torch.empty((0, self._row_bytes), dtype=torch.uint8, device=self.comm.device)

    def _cut(
        self, tensors: Sequence[torch.Tensor], leaving: Any, rows_per_slot: int, first: int
    ) -> tuple[torch.Tensor, list[int]]:
        """Rows [first, first + _ROWS_PER_ROUND) of all that this rank sends, and their receivers."""
        rows: list[torch.Tensor] = []
        to: list[int] = []
        for i in range(first, min(first + _ROWS_PER_ROUND, len(leaving) * rows_per_slot)):
            _, dest, source, _ = leaving[i // rows_per_slot]
            if not rows or i % rows_per_slot == 0:
                flat = torch.cat([t[source].reshape(-1).view(torch.uint8) for t in tensors])
                flat = torch.nn.functional.pad(flat, (0, rows_per_slot * self._row_bytes - len(flat))).view(
                    rows_per_slot, -1
                )
            rows.append(flat[i % rows_per_slot])
            to.append(dest)
        return torch.stack(rows) if rows else self._no_rows(), to

    def _dispatch(self, rows: torch.Tensor, to: list[int]) -> list[tuple[int, torch.Tensor]]:
        """Execute one round; return (source rank, row) of all arrivals, by source, in the order of sending."""
        x = rows.view(torch.float32).view(-1, self._row_bytes // 4)
        out = self._buffer.dispatch(
            x, torch.tensor(to, dtype=torch.int64, device=x.device).view(-1, 1), layout="rank"
        )
        return list(zip(out.source_rank.tolist(), out.x.view(torch.uint8).clone()))

    @staticmethod
    def _paste(data: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        at = 0
        for t in targets:
            n = t.numel() * t.element_size()
            t.copy_(data[at : at + n].view(t.dtype).view(t.shape))
            at += n
