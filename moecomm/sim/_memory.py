"""What the native simulator holds, as tensors."""

from __future__ import annotations

from typing import Any

import ctypes

import numpy as np
import torch


def copy_of(address: int, dtype: torch.dtype, *shape: Any) -> Any:
    """Copy the memory at an address to a tensor."""
    count = int(np.prod(shape))
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(shape).clone()
