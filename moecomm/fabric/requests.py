"""Collective requests, for Domain.submit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Multicast:
    """A multicast of rows: the arguments of Domain.multicast.

    .ranks: the receivers. .dst: symmetric Tensor or list of them. .root: the rank that has the rows. .src: Tensor or
    list of them, of the shapes of dst, on the root only (None elsewhere).
    """

    ranks: Sequence[int]
    dst: Any
    root: int
    src: Any = None


@dataclass(frozen=True)
class Reduce:
    """A reduction of rows: the arguments of Domain.reduce.

    .ranks: the contributors. .src: symmetric Tensor or list of them. .root: the rank that gets the sum. .dst: Tensor or
    list of them, of the shapes of src, on the root only (None elsewhere). .op: "sum". .accumulate: torch.float32, or
    torch.float64 for float64 rows.
    """

    ranks: Sequence[int]
    src: Any
    root: int
    dst: Any = None
    op: str = "sum"
    accumulate: torch.dtype = torch.float32
