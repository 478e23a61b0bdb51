"""Allocation of a Domain's memory. Equal calls give equal offsets on all ranks."""

from __future__ import annotations

ALIGNMENT = 256  # bytes; a tensor begins on a multiple


class Heap:
    """Pieces of [0, size), allocated first-fit."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: dict[int, int] = {}  # offset: bytes

    @property
    def held(self) -> int:
        """Number of bytes that are taken."""
        return sum(self._held.values())

    def find(self, wanted: int) -> int | None:
        """Return the lowest offset of a free piece of this size, or None. Do not take it."""
        at = 0
        for offset, taken in sorted(self._held.items()):
            if offset - at >= wanted:
                break
            at = offset + taken
        return at if at + wanted <= self.size else None

    def take(self, offset: int, wanted: int) -> None:
        """Take a piece that find() has found."""
        self._held[offset] = wanted

    def release(self, offset: int) -> None:
        """Free a piece."""
        del self._held[offset]

    def holds(self, offset: int) -> bool:
        """Whether a taken piece begins at this offset."""
        return offset in self._held

    @staticmethod
    def rounded(wanted: int) -> int:
        """Return the bytes that a tensor takes. Two tensors never share a cache line."""
        return -(-max(wanted, 1) // ALIGNMENT) * ALIGNMENT
