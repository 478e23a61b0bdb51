"""What the drop-in refuses: a wrong argument is moecomm's InvalidArgument, a feature that it does not have
is Unsupported.
"""

from __future__ import annotations

import torch

from ...errors import InvalidArgument


class Unsupported(InvalidArgument, NotImplementedError):
    """The call asks for something that exists in deep_ep and not in this drop-in; the message says why and
    what to use.
    """


def refuse(op, what, rank=None):
    """Raise InvalidArgument for a call.

    Raises
    ------
    InvalidArgument
        Always.
    """
    raise InvalidArgument(f"{op}: {what}", op=op, rank=rank)


def describe(value):
    """A tensor's kind, or the type of anything else, in words."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__qualname__}"
    return f"{'' if value.is_contiguous() else 'non-contiguous '}{value.dtype} {list(value.shape)} on {value.device}"


def require_tensor(op, name, value, *, optional=False, dtypes=None, shape=None):
    """The value, which must be a plain dense tensor, without its gradient; None stays None where it is optional.

    Parameters
    ----------
    op, name : str
        For the message.
    value : Tensor
    optional : bool
    dtypes : tuple of torch.dtype, optional
    shape : tuple, optional
        None in it stands for any length.

    Raises
    ------
    InvalidArgument
        It is something else; a subclass of Tensor is never read as if it were memory.
    """
    if value is None and optional:
        return None
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        refuse(
            op,
            f"{name} is a {type(value).__qualname__}; expected a plain torch.Tensor (of a DTensor: its to_local())",
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
