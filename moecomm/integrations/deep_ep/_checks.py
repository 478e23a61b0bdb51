"""Argument checks that all buffers of the drop-in share."""

from __future__ import annotations

import torch

from .errors import refuse, require_tensor

IDS = (torch.int64, torch.int32)


def capturing():
    """Whether a CUDA graph is being captured. The host cannot read tensors then, or make memory for new shapes."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_int(op, name, value, least, rank=None):
    """Refuse a value that is not an int or is less than `least`.

    Raises
    ------
    InvalidArgument
        The value is refused.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        refuse(op, f"{name} is {value!r}; expected an int >= {least}", rank)


def check_ints(op, rank=None, **values):
    """Refuse named values that are not ints >= 0."""
    for name, value in values.items():
        check_int(op, name, value, 0, rank)


def check_experts(op, num_experts, size, rank):
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


def check_picks(op, topk_idx, topk_weights, tokens, experts, rank):
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


def check_rows(op, x, num_rows, rank):
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


def sum_of_biases(op, bias, shape, rank):
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


def aligned(counts, alignment):
    """Round each count up to a multiple of alignment."""
    return [-(-n // alignment) * alignment for n in counts]
