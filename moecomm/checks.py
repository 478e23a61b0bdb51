"""Checks of plain arguments: numbers, paths and arrays that a user or a command line hands over.

Every check returns the value as Python's own type, or raises InvalidArgument that names the argument, what was given and what
was expected. A value whose repr raises, or is long, does not get in the way.
"""

from __future__ import annotations

import math
import operator
import os

import numpy as np
import torch

from .errors import InvalidArgument
from .tensors import plain

_LONGEST = 120  # characters of a value in a message
MOST_EXPERTS = 65535  # of a model, and slots of a layer: what a Buffer can hold


def spelled(value):
    """The value's repr in one short line; its type where it has none."""
    try:
        if isinstance(value, torch.Tensor):
            return f"a {value.dtype} tensor {list(value.shape)} on {value.device}"
        if isinstance(value, np.ndarray) and value.ndim:
            return f"a {value.dtype} array {list(value.shape)}"
        text = " ".join(repr(value).split())
    except (
        Exception
    ) as error:  # a foreign __repr__, or a tensor without a shape: the check itself is what the user must see
        return f"a {type(value).__qualname__} (its repr raises {type(error).__name__})"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def require(ok, op, name, value, expected):
    """Raise InvalidArgument that names the argument, its value and what was expected, unless ok.

    Raises
    ------
    InvalidArgument
    """
    if not ok:
        raise InvalidArgument(f"{op}: {name} is {spelled(value)}; expected {expected}", op=op)


def integer(op, name, value, low=1, high=(1 << 31) - 1):
    """An integer of any library in low..high, as int.

    Raises
    ------
    InvalidArgument
    """
    try:
        found = operator.index(value)
    except Exception:  # a TypeError, or whatever a tensor without memory raises
        found = None
    require(found is not None and low <= found <= high, op, name, value, f"an int in {low}..{high}")
    return found


def number(op, name, value, low=0.0, positive=False):
    """A finite number >= low, or above 0 with `positive`, as float.

    Raises
    ------
    InvalidArgument
    """
    try:
        found = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:  # a TypeError or OverflowError, or whatever a tensor without memory raises
        found = math.nan
    require(
        math.isfinite(found) and (found > 0 if positive else found >= low),
        op,
        name,
        value,
        "a finite number > 0" if positive else f"a finite number >= {low:g}",
    )
    return found


def flag(op, name, value):
    """A bool.

    Raises
    ------
    InvalidArgument
    """
    require(isinstance(value, (bool, np.bool_)), op, name, value, "True or False")
    return bool(value)


def path(op, name, value):
    """A path as str.

    Raises
    ------
    InvalidArgument
    """
    try:
        found = os.fspath(value)
    except Exception:  # a TypeError, or what a foreign __fspath__ raises
        found = None
    require(isinstance(found, str) and found and "\0" not in found, op, name, value, "a path")
    return found


def reals(op, name, value):
    """Numbers of any array, tensor or nested list as a contiguous float64 array on the host.

    Raises
    ------
    InvalidArgument
    """
    return _array(op, name, value, np.float64, "fiub", "an array or tensor of real numbers")


def integers(op, name, value):
    """Integers of any array, tensor or nested list as a contiguous int64 array on the host.

    Raises
    ------
    InvalidArgument
    """
    return _array(op, name, value, np.int64, "iu", "an array or tensor of integers")


def _array(op, name, value, dtype, kinds, expected):
    if isinstance(value, torch.Tensor):
        value = plain(op, name, value)
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            if dtype is np.float64 and value.is_floating_point():
                value = value.to(torch.float64)  # NumPy knows neither bfloat16 nor float8
            found = np.asarray(value.cpu())
        else:
            found = np.asarray(value)
    except Exception:  # a ragged list, a tensor without memory, an __array__ that raises: all are no array
        found = None
    require(found is not None and (found.dtype.kind in kinds or found.size == 0), op, name, value, expected)
    try:
        return np.ascontiguousarray(found, dtype=dtype)
    except (TypeError, ValueError):  # an empty array of objects
        require(False, op, name, value, expected)
