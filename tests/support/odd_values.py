"""Invalid values for the check of every argument: each must be refused by a typed error that names the argument."""

import math

import numpy as np
import torch


class Unprintable:
    """Its repr and every conversion raise."""

    def __repr__(self):
        raise RuntimeError("no repr")

    def __index__(self):
        raise KeyError("no index")

    def __float__(self):
        raise ZeroDivisionError("no float")

    def __array__(self, *args, **kwargs):
        raise AttributeError("no array")

    def __fspath__(self):
        raise LookupError("no path")


NUMBERS = (math.nan, math.inf, -math.inf, -1, 0, 2**70, -(2**70), 1e300, 1.5)
OTHERS = (
    None,
    [],
    {},
    (),
    "x",
    "",
    b"",
    b"x",
    object(),
    Unprintable(),
    torch.bfloat16,
    int,
    lambda: 0,
    range(0),
    {1, 2},
    1j,
)
ARRAYS = (
    torch.zeros(()),
    torch.zeros(2),
    torch.zeros((1, 2, 3)),
    torch.zeros((2, 2), dtype=torch.complex64),
    torch.zeros((2, 2), device="meta"),
    torch.zeros((0, 4)),
    torch.full((2, 2), math.nan),
    torch.zeros((2, 2), dtype=torch.float8_e4m3fn),
    torch.zeros((2, 2), dtype=torch.bool),
    torch.zeros((2, 2)).to_sparse(),
    torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]),
    torch.zeros((2, 4), dtype=torch.int64),
    np.zeros(2),
    np.zeros((2, 2), dtype=object),
    np.array([["a"]]),
    np.zeros((2, 2), dtype="datetime64[s]"),
    np.zeros((1, 1), dtype=[("a", "i4")]),
    np.float64("nan"),
    np.int64(-1),
    [[1, 2], [3]],
    [["x"]],
    [[None]],
    [[2**70]],
    [[-1.0]],
)
EVERY = (*NUMBERS, *OTHERS, *ARRAYS)


def label(value):
    """Return a short name for a test's id."""
    try:
        return f"{type(value).__name__}-{str(value)[:12]}".replace("\n", " ")
    except Exception:
        return type(value).__name__
