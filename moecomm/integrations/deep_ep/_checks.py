"""Argument checks that all buffers of the drop-in share."""

from __future__ import annotations

from typing import Any

import torch

from .errors import refuse, require_tensor

IDS = (torch.int64, torch.int32)


def capturing() -> Any:
    """Whether a CUDA graph is being captured. The host cannot read tensors then, or make memory for new shapes."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_int(op: str, name: str, value: Any, least: Any, rank: int | None = None) -> None:
    """Refuse a value that is not an int or is less than `least`.

    Raises
    ------
    InvalidArgument
        The value is refused.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        refuse(op, f"{name} is {value!r}; expected an int >= {least}", rank)


def check_ints(op: str, rank: int | None = None, **values: Any) -> None:
    """Refuse named values that are not ints >= 0."""
    for name, value in values.items():
        check_int(op, name, value, 0, rank)


def check_experts(op: str, num_experts: Any, size: Any, rank: int) -> None:
    """Refuse a number of experts that is not a positive multiple of the number of ranks.

    Raises
    ------
    InvalidArgument
        The number is refused.
    """
    if (
        isinstance(num_experts, bool)
        or not isinstance(num_experts, int)
        or num_experts < 1
        or num_experts % size
    ):
        refuse(op, f"num_experts is {num_experts!r}; expected a multiple of the {size} ranks", rank)


def check_picks(op: str, topk_idx: Any, topk_weights: Any, tokens: Any, experts: Any, rank: int) -> Any:
    """Check picks and their weights; return (ids [T, K], weights [T, K] or None).

    Raises
    ------
    InvalidArgument
        A dtype or shape is wrong, or an id is out of range.
    """
    ids = require_tensor(op, "topk_idx", topk_idx, dtypes=IDS, shape=(tokens, None))
    weights = require_tensor(
        op, "topk_weights", topk_weights, optional=True, dtypes=(torch.float32,), shape=tuple(ids.shape)
    )
    if not 1 <= ids.shape[1] <= min(32, experts):
        refuse(op, f"topk_idx has {ids.shape[1]} picks per token; expected 1..{min(32, experts)}", rank)
    if not capturing() and ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < experts:
        refuse(
            op,
            f"topk_idx contains ids from {int(ids.min())} to {int(ids.max())}; expected -1 (no expert) or ids "
            f"below num_experts = {experts}",
            rank,
        )
    return ids, weights


def check_rows(op: str, x: Any, num_rows: int, rank: int) -> Any:
    """Check the experts' output [num_rows, H] for combine of the core Buffer.

    Raises
    ------
    InvalidArgument
        The dtype or shape is wrong, or a row is not a multiple of 16 bytes.
    """
    rows = require_tensor(
        op,
        "x",
        x,
        dtypes=(torch.bfloat16, torch.float16, torch.float32, torch.float64),
        shape=(num_rows, None),
    )
    if not rows.shape[1] or rows.shape[1] * rows.dtype.itemsize % 16:
        refuse(
            op, f"a row of x has {rows.shape[1] * rows.dtype.itemsize} bytes; expected a multiple of 16", rank
        )
    return rows


def sum_of_biases(op: str, bias: Any, shape: Any, rank: int) -> Any:
    """Sum of one bias or a pair of biases, float32 [T, H]; None if there is none.

    Raises
    ------
    InvalidArgument
        There are more than two, or a shape is wrong.
    """
    given = bias if isinstance(bias, (tuple, list)) else (bias,)
    if len(given) > 2:
        refuse(op, f"bias is {len(given)} tensors; expected None, one, or a pair", rank)
    floats = [
        b.float()
        for b in (require_tensor(op, "bias", b, optional=True, shape=shape) for b in given)
        if b is not None
    ]
    return None if not floats else floats[0] if len(floats) == 1 else floats[0] + floats[1]


def aligned(counts: Any, alignment: Any) -> Any:
    """Round each count up to a multiple of alignment."""
    return [-(-n // alignment) * alignment for n in counts]
