"""The one check of tensors that callers pass: a plain tensor with memory, or InvalidArgument that names what it is instead.

Native code reads and writes memory by address. Tensor subclasses, wrappers of function transforms and tensors whose storage was
freed have no address, or one at which their values are not.
"""

from __future__ import annotations

import sys

import torch
from torch.autograd import forward_ad

from .errors import InvalidArgument

_grad_enabled = torch.is_grad_enabled


def refuse(op, what, rank=None):
    """Raise InvalidArgument of a verb.

    Raises
    ------
    InvalidArgument
    """
    raise InvalidArgument(
        f"{op}: {what}" if rank is None else f"{op} on rank {rank}: {what}", op=op, rank=rank
    )


def plain(op, name, value, *, rank=None, optional=False, written=False, traceable=False):
    """The argument as a plain tensor; what speaks DLPack (NumPy, CuPy, JAX, ...) as a view of its memory.

    A producer on a GPU is asked for its data on the current stream of that GPU, which is the stream of this call: what it
    still has to write there comes before the call reads it, and nothing waits for the host.

    Parameters
    ----------
    op, name : str
        The verb and its argument, for the error.
    value : object
    rank : int, optional
        Of the caller.
    optional : bool
        None is allowed.
    written : bool
        The verb writes to it.
    traceable : bool
        The verb goes through torch.ops.moecomm while it is traced: the tracer's own tensors pass then.

    Raises
    ------
    InvalidArgument
        It is no tensor, a subclass other than Parameter and AsyncCollectiveTensor (which is waited for), inside a function
        transform or forward-mode AD, nested, sparse, a negated view, or without memory.
    """
    if value is None and optional:
        return None
    if not isinstance(value, torch.Tensor):
        value = _from_dlpack(op, name, value, rank, written)
    kind = type(value)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        if traceable and _is_traced(value):
            return value
        value = _unwrap(op, name, value, rank)
    if torch.compiler.is_dynamo_compiling():  # what stands for values here is looked at by torch
        return value
    _check_transforms(op, name, value, rank)
    if value.is_nested:
        refuse(op, f"{name} is a nested tensor; expected a dense one, such as its values()", rank)
    if value.layout != torch.strided:
        refuse(op, f"{name} is {value.layout}; expected a dense tensor", rank)
    if value.is_neg():  # its memory holds the numbers without their sign
        refuse(op, f"{name} is a negated view (of a conjugate); expected its resolve_neg()", rank)
    if value.device.type in ("cpu", "cuda") and not _has_memory(value):
        refuse(
            op,
            f"{name} is a tensor {list(value.shape)} whose storage holds {value.untyped_storage().nbytes()} bytes, so its values are not there; "
            "expected one whose storage has not been freed or resized (FSDP frees parameters between their uses)",
            rank,
        )
    return value


def wants_gradient(a: object, b: object = None) -> bool:
    """Whether autograd would record what is computed from one of them."""
    if _grad_enabled():  # asked on the decode path: None is not asked for an attribute that it lacks
        return getattr(a, "requires_grad", False) or (b is not None and getattr(b, "requires_grad", False))
    return False


def refuse_gradients(
    op: str, instead: str = "", *, rank: int | None = None, **tensors: torch.Tensor | None
) -> None:
    """Refuse tensors whose gradient a call would drop.

    Parameters
    ----------
    op : str
        The verb, for the error.
    instead : str
        What else the caller may do, beside detaching the tensor.
    rank : int, optional
        Of the caller.
    tensors : Tensor or None
        By their names as arguments.

    Raises
    ------
    InvalidArgument
        Gradients are on and one of the tensors requires its own.
    """
    for name, t in tensors.items():
        if wants_gradient(t):
            refuse(
                op,
                f"{name} requires a gradient, which {op} cannot carry; pass {name}.detach(){instead}",
                rank,
            )


def address(t):
    """Where a tensor's elements begin; 0 for None, and for a tensor without elements.

    Raises
    ------
    InvalidArgument
        It has elements and no memory: 0 would mean that it is left out.
    """
    if t is None:
        return 0
    at = t.data_ptr()
    if at == 0 and t.numel():
        refuse(
            "moecomm",
            f"a tensor {t.dtype} {list(t.shape)} on {t.device} has no memory; expected one that has",
        )
    return at


def _from_dlpack(op, name, value, rank, written):
    why, readonly = (
        "",
        getattr(getattr(value, "flags", None), "writeable", True) is False,
    )  # NumPy's word; torch drops it
    if hasattr(value, "__dlpack__"):
        try:
            value = torch.from_dlpack(value)
        except (TypeError, RuntimeError, BufferError, ValueError) as error:
            why = f" ({error})"
    if not isinstance(value, torch.Tensor):
        refuse(op, f"{name} is a {type(value).__qualname__}; expected a tensor or a DLPack array{why}", rank)
    if written and readonly:
        refuse(op, f"{name} is an array that may not be written to; expected one that may", rank)
    return value


def _is_traced(value):
    """Whether it stands for a value while torch.export, make_fx or a FakeTensorMode looks on."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
        return False
    return isinstance(
        value, (torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor)
    )


def _class_of(module, name):
    """A class of a module that this process may not have imported: then nothing is one of it."""
    return getattr(sys.modules.get(module), name, ())


def _unwrap(op, name, value, rank):
    """The plain tensor behind a subclass, where there is one."""
    if isinstance(value, _class_of("torch.distributed._functional_collectives", "AsyncCollectiveTensor")):
        wait = _Wait.apply if value.requires_grad and torch.is_grad_enabled() else _Wait.of
        return plain(op, name, wait(value), rank=rank)
    if isinstance(value, _class_of("torch.distributed.tensor", "DTensor")):
        refuse(op, f"{name} is a DTensor; expected a plain tensor, such as {name}.to_local()", rank)
    if isinstance(value, torch._subclasses.FakeTensor):
        refuse(
            op,
            f"{name} is a FakeTensor, which has no memory; expected a tensor with values, or torch.compile and torch.export around dispatch and "
            "combine",
            rank,
        )
    if value.is_nested:
        refuse(op, f"{name} is a nested tensor; expected a dense one, such as its values()", rank)
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or torch.nn.parameter.is_lazy(
        value
    ):
        refuse(
            op,
            f"{name} is a {type(value).__qualname__}, a tensor subclass that need not have memory of its own; expected a plain tensor",
            rank,
        )
    with torch._C.DisableTorchFunctionSubclass():  # only methods differ: the memory is a tensor's
        return value.as_subclass(torch.Tensor)


class _Wait(torch.autograd.Function):
    """The result of a collective that was still under way."""

    @staticmethod
    def of(value):
        """Without gradients."""
        return value.wait()

    @staticmethod
    def forward(ctx, value):
        return value.wait()

    @staticmethod
    def backward(ctx, grad):
        return grad


def _check_transforms(op, name, value, rank):
    """Refuse what function transforms made: a call moves rows of all ranks, so it cannot be batched, and its forward derivative is not defined."""
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(value):
        where = (
            "torch.func.vmap"
            if functorch.is_batchedtensor(value)
            else "torch.func.functionalize"
            if functorch.is_functionaltensor(value)
            else "torch.func.grad, vjp, jvp, jacrev or jacfwd"
        )
        refuse(
            op,
            f"{name} is a tensor inside {where}; moecomm calls have no rule for it, expected a plain tensor (gradients: backward() or "
            "torch.autograd.grad; batches: one call of all tokens)",
            rank,
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        refuse(
            op,
            f"{name} is a dual tensor of forward-mode AD, whose tangent would be lost; expected a plain tensor "
            "(torch.autograd.forward_ad.unpack_dual), or reverse mode",
            rank,
        )


def _has_memory(t):
    if t.numel() == 0:
        return True
    last = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
    return t.data_ptr() != 0 and t.untyped_storage().nbytes() >= (last + 1) * t.element_size()
