"""Refusals of the drop-in: InvalidArgument of moecomm for a wrong argument, Unsupported for a missing feature."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import InvalidArgument


class Unsupported(InvalidArgument, NotImplementedError):
    """The call needs a feature of deep_ep that this drop-in lacks. The text says why, and what to use instead."""


def refuse(op: str, what: str, rank: int | None = None) -> None:
    """Raise InvalidArgument for a call.

    Raises
    ------
    InvalidArgument
        Always.
    """
    raise InvalidArgument(f"{op}: {what}", op=op, rank=rank)


def describe(value: Any) -> str:
    """Text with dtype, shape and device of a tensor, or with the type of any other object."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__qualname__}"
    return f"{'' if value.is_contiguous() else 'non-contiguous '}{value.dtype} {list(value.shape)} on {value.device}"


def require_tensor(
    op: str, name: str, value: Any, *, optional: bool = False, dtypes: Any = None, shape: Any = None
) -> Any:
    """Check that a value is a plain dense tensor; return it detached and contiguous.

    Parameters
    ----------
    op, name : str
        Names of the call and of the argument, for the error text.
    value : Tensor
    optional : bool
        Return None for None.
    dtypes : tuple of torch.dtype, optional
        Allowed dtypes.
    shape : tuple, optional
        Expected shape. None in it allows any length.

    Raises
    ------
    InvalidArgument
        The value is not such a tensor. Subclasses of Tensor are refused, because their memory may mean something
        else.
    """
    if value is None and optional:
        return None
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        refuse(
            op,
            f"{name} is a {type(value).__qualname__}; expected a plain torch.Tensor (for a DTensor, use to_local())",
        )
    wrong_shape = shape is not None and (
        value.dim() != len(shape)
        or any(n is not None and n != m for n, m in zip(shape, value.shape, strict=False))
    )
    if wrong_shape or (dtypes is not None and value.dtype not in dtypes) or value.layout != torch.strided:
        kinds = "a tensor" if dtypes is None else " or ".join(map(str, dtypes))
        sizes = "" if shape is None else f" [{', '.join('any' if n is None else str(n) for n in shape)}]"
        refuse(op, f"{name} is {describe(value)}; expected {kinds}{sizes}")
    return value.detach().contiguous()
