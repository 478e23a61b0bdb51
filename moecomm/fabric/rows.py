"""Rows of a pair of tensors: contiguous bytes with a stride in each tensor, for the native code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import itertools

import torch

Row = tuple[
    int, int, int, int, int, int, int, int
]  # for _domain_rows of moecomm/_native/cpu_world/domain.pyx


def merged(*tensors: torch.Tensor) -> list[tuple[int, ...]]:
    """Return [(size, stride in each tensor)] of the common dimensions, merged where all tensors allow it."""
    dims: list[tuple[int, ...]] = []
    for size, *strides in zip(tensors[0].shape, *(t.stride() for t in tensors)):
        if size == 1:
            continue
        # Merge with the dimension before if this one fills one step of it.
        if dims and all(outer == stride * size for outer, stride in zip(dims[-1][1:], strides)):
            dims[-1] = (dims[-1][0] * size, *strides)
        else:
            dims.append((size, *strides))
    return dims


def rows_of(there: torch.Tensor, offset: int, here: torch.Tensor | None) -> list[Row]:
    """Return the rows of two tensors of equal shape and dtype. `there` begins at an offset of every rank's memory.

    Without `here` they are the rows of `there`. They are the same with a `here` for which fits() is true.
    """
    if there.numel() == 0:
        return []
    return list(_rows(merged(there, there if here is None else here), there, offset, here))


def fits(there: torch.Tensor, here: torch.Tensor) -> bool:
    """Whether the rows of both tensors are the rows of `there`."""
    dims = merged(there, here)
    inner = not dims or dims[-1][1] != 1 or dims[-1][2] == 1  # contiguous in both
    return inner and [d[:2] for d in dims] == merged(there)


def _rows(
    dims: list[tuple[int, ...]], there: torch.Tensor, offset: int, here: torch.Tensor | None
) -> Iterator[Row]:
    item, at = there.element_size(), 0 if here is None else here.data_ptr()
    if dims and dims[-1][1:] == (1, 1):
        size, dims = dims[-1][0] * item, dims[:-1]
    else:
        size = item
    *outer, (count, a, b) = dims or [(1, 0, 0)]
    for index in itertools.product(*(range(n) for n, _, _ in outer)):
        first = sum(i * s for i, (_, s, _) in zip(index, outer)) * item
        second = sum(i * s for i, (_, _, s) in zip(index, outer)) * item
        yield offset + first, at + second if at else 0, size, count, a * item, b * item, 0, 0


def indexed(
    there: torch.Tensor,
    offset: int,
    there_rows: torch.Tensor | None,
    here: torch.Tensor,
    here_rows: torch.Tensor | None,
) -> list[Row]:
    """Return the rows that indices select in one tensor or both. Each selected row is contiguous."""
    count = int((there_rows if there_rows is not None else here_rows).numel())  # type: ignore[union-attr]
    size = there[:1].numel() * there.element_size()
    if count == 0 or size == 0:
        return []
    return [
        (
            offset,
            here.data_ptr(),
            size,
            count,
            there.stride(0) * there.element_size(),
            here.stride(0) * here.element_size(),
            0 if there_rows is None else there_rows.data_ptr(),
            0 if here_rows is None else here_rows.data_ptr(),
        )
    ]


def extent(t: Any) -> tuple[int, int]:
    """Return (begin, end) of the addresses of a tensor's elements."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def overlaps_itself(t: torch.Tensor) -> bool:
    """Whether two elements have the same address, as in an expanded tensor."""
    reach = 0
    for stride, size in sorted((s, n) for n, s in zip(t.shape, t.stride()) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
