"""Checks of plain arguments: numbers, paths and arrays from users and command lines.

Every check returns the value as a built-in type, or raises InvalidArgument, which names the argument, its value and
what was expected. A value whose repr raises, or is long, is reported, too.
"""

from __future__ import annotations

from typing import Any

import math
import operator
import os

import numpy as np
import torch

from .errors import InvalidArgument
from .tensors import plain

_LONGEST = 120  # characters of a value in an error text
MOST_EXPERTS = 65535  # limit of a Buffer: experts of a model, and slots of a layer


def spelled(value: Any) -> str:
    """The repr of a value on one short line, or its type if repr raises."""
    try:
        if isinstance(value, torch.Tensor):
            return f"a {value.dtype} tensor {list(value.shape)} on {value.device}"
        if isinstance(value, np.ndarray) and value.ndim:
            return f"a {value.dtype} array {list(value.shape)}"
        text = " ".join(repr(value).split())
    except Exception as error:  # any error of a foreign __repr__: the user must see the error of the check
        return f"a {type(value).__qualname__} (its repr raises {type(error).__name__})"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def require(ok: object, op: str, name: str, value: Any, expected: str) -> None:
    """Raise InvalidArgument, with the argument, its value and what was expected, unless ok.

    Raises
    ------
    InvalidArgument
        ok is false.
    """
    if not ok:
        raise InvalidArgument(f"{op}: {name} is {spelled(value)}; expected {expected}", op=op)


def integer(op: str, name: str, value: Any, low: int = 1, high: int = (1 << 31) - 1) -> int:
    """Convert an integer of any library to int; refuse values outside low..high.

    Raises
    ------
    InvalidArgument
        The value is refused.
    """
    try:
        found: Any = operator.index(value)
    except Exception:  # TypeError, or any error of a tensor without memory
        found = None
    require(found is not None and low <= found <= high, op, name, value, f"an int in {low}..{high}")
    checked: int = found
    return checked


def number(op: str, name: str, value: Any, low: float = 0.0, positive: bool = False) -> float:
    """Convert a finite number to float; refuse values below low or, with `positive`, values <= 0.

    Raises
    ------
    InvalidArgument
        The value is refused.
    """
    try:
        found = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:  # TypeError, OverflowError, or any error of a tensor without memory
        found = math.nan
    require(
        math.isfinite(found) and (found > 0 if positive else found >= low),
        op,
        name,
        value,
        "a finite number > 0" if positive else f"a finite number >= {low:g}",
    )
    return found


def flag(op: str, name: str, value: Any) -> bool:
    """Convert to bool; refuse anything but bools.

    Raises
    ------
    InvalidArgument
        The value is refused.
    """
    require(isinstance(value, (bool, np.bool_)), op, name, value, "True or False")
    return bool(value)


def path(op: str, name: str, value: Any) -> str:
    """Convert a path to str.

    Raises
    ------
    InvalidArgument
        The value is not a path.
    """
    try:
        found: Any = os.fspath(value)
    except Exception:  # TypeError, or any error of a foreign __fspath__
        found = None
    require(isinstance(found, str) and found and "\0" not in found, op, name, value, "a path")
    checked: str = found
    return checked


def reals(op: str, name: str, value: Any) -> Any:
    """Convert an array, tensor or nested list of numbers to a contiguous float64 array on the host.

    Raises
    ------
    InvalidArgument
        The value is none of these.
    """
    return _array(op, name, value, np.float64, "fiub", "an array or tensor of real numbers")


def integers(op: str, name: str, value: Any) -> Any:
    """Convert an array, tensor or nested list of integers to a contiguous int64 array on the host.

    Raises
    ------
    InvalidArgument
        The value is none of these.
    """
    return _array(op, name, value, np.int64, "iu", "an array or tensor of integers")


def _array(op: str, name: str, value: Any, dtype: Any, kinds: str, expected: str) -> Any:
    if isinstance(value, torch.Tensor):
        value = plain(op, name, value)
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            if dtype is np.float64 and value.is_floating_point():
                value = value.to(torch.float64)  # NumPy has neither bfloat16 nor float8
            found = np.asarray(value.cpu())
        else:
            found = np.asarray(value)
    except Exception:  # a ragged list, a tensor without memory, an __array__ that raises
        found = None
    require(found is not None and (found.dtype.kind in kinds or found.size == 0), op, name, value, expected)
    try:
        return np.ascontiguousarray(found, dtype=dtype)
    except (TypeError, ValueError):  # an empty array of objects
        require(False, op, name, value, expected)


def in_words(error: Any) -> str:
    """The text of an error, or a replacement if it contains objects that cannot be printed."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - any error of a foreign __str__
        return "an error that cannot be printed"
