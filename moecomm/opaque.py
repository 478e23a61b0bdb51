"""Opaque: rows of any dtype with side tensors, which dispatch sends unchanged."""

from __future__ import annotations

import math
import zlib

import torch

from .arguments import describe
from .tensors import plain, refuse

_ALIGNMENT = 16  # of every side tensor within a token's bytes


class Opaque:
    """Rows of any dtype and any number of side tensors per token, for dispatch(Opaque(rows, *sides), ...).

    dispatch sends the bytes unchanged, so every format is possible: both kinds of FP8, MXFP8 with a scale per 32
    elements, NVFP4, int8 with a scale per token, token numbers. `out.x` has the rows and `out.sides` the side tensors,
    with their original dtypes and columns. Rows need no extra copy; side tensors are packed once.

    Parameters
    ----------
    rows : Tensor [T, columns] of any dtype
        Contiguous. The bytes of a row must be a multiple of 16.
    *sides : Tensor [T] or [T, n] of any dtype

    Raises
    ------
    InvalidArgument
        A tensor has another shape or layout.
    """

    def __init__(self, rows: torch.Tensor, *sides: torch.Tensor) -> None:
        op = "Opaque"
        self.rows = plain(op, "rows", rows)
        self.sides = tuple(plain(op, f"sides[{i}]", side) for i, side in enumerate(sides))
        if (
            self.rows.dim() != 2
            or not self.rows.is_contiguous()
            or self.row_bytes == 0
            or self.row_bytes % 16
        ):
            refuse(
                op,
                f"rows is {describe(self.rows)}; expected contiguous [T, columns] with a multiple of 16 bytes per row",
            )
        for i, side in enumerate(self.sides):
            if side.dim() not in (1, 2) or len(side) != len(self.rows) or side.device != self.rows.device:
                refuse(
                    op,
                    f"sides[{i}] is {describe(side)}; expected [{len(self.rows)}] or [{len(self.rows)}, n] on "
                    f"{self.rows.device}",
                )

    @property
    def row_bytes(self) -> int:
        """Number of bytes of a row."""
        rows: torch.Tensor = self.rows
        return rows.shape[1] * rows.dtype.itemsize

    @property
    def side_bytes(self) -> int:
        """Number of bytes of a token's side tensors in a message, a multiple of 16."""
        return sum(_padded(_bytes_of(side)) for side in self.sides)

    @property
    def signature(self) -> int:
        """Number that identifies dtypes and columns. Equal on all ranks."""
        kinds = [(str(t.dtype), tuple(t.shape[1:])) for t in (self.rows, *self.sides)]
        return zlib.crc32(repr(kinds).encode())

    def requires_grad(self) -> bool:
        """Whether a part requires a gradient, which is not supported."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.rows, *self.sides))

    def packed_sides(self) -> torch.Tensor | None:
        """Return the side tensors token by token, uint8 [T, side_bytes], or None without side tensors."""
        if not self.side_bytes:
            return None
        tokens = len(self.rows)
        packed = torch.zeros((tokens, self.side_bytes), dtype=torch.uint8, device=self.rows.device)
        begin = 0
        for side in self.sides:
            size = _bytes_of(side)
            raw = side.detach().contiguous().view(tokens, size // side.dtype.itemsize).view(torch.uint8)
            packed[:, begin : begin + size] = raw
            begin += _padded(size)
        return packed

    def unpack_rows(self, raw: torch.Tensor) -> torch.Tensor:
        """Return rows of the original dtype from uint8 [N, row_bytes]."""
        return raw.view(self.rows.dtype)

    def unpack_sides(self, raw: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return uint8 [N, side_bytes] as views like the original side tensors."""
        found, begin = [], 0
        for side in self.sides:
            size = _bytes_of(side)
            if raw is None or size == 0:
                found.append(side.new_empty((0 if raw is None else len(raw), *side.shape[1:])))
                continue
            part = raw[:, begin : begin + size].view(side.dtype)
            found.append(part[:, 0] if side.dim() == 1 else part)
            begin += _padded(size)
        return tuple(found)


def _bytes_of(side: torch.Tensor) -> int:
    return math.prod(side.shape[1:]) * side.dtype.itemsize


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
