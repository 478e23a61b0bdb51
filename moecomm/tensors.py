"""Check of tensors that callers pass: each must be a plain tensor with memory.

Native code reads and writes memory by address. Tensor subclasses, wrappers of function transforms and tensors with
freed storage have no address, or an address at which their values are not stored.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from .errors import InvalidArgument

_grad_enabled = torch.is_grad_enabled


def refuse(op: str, what: str, rank: int | None = None) -> NoReturn:
    """Raise InvalidArgument for a call.

    Raises
    ------
    InvalidArgument
        Always.
    """
    raise InvalidArgument(
        f"{op}: {what}" if rank is None else f"{op} on rank {rank}: {what}", op=op, rank=rank
    )


def plain(
    op: str,
    name: str,
    value: Any,
    *,
    rank: int | None = None,
    optional: bool = False,
    written: bool = False,
    traceable: bool = False,
) -> Any:
    """Return the argument as a plain tensor. A DLPack array (NumPy, CuPy, JAX, ...) becomes a view of its memory.

    A DLPack producer on a GPU exports its data for the current stream of that GPU, on which the call runs. So its
    pending writes come before the reads of the call, and the host does not wait.

    Parameters
    ----------
    op, name : str
        Names of the call and of the argument, for the error text.
    value : object
    rank : int, optional
        This rank, for the error text.
    optional : bool
        Allow None.
    written : bool
        The call writes to the tensor.
    traceable : bool
        The call uses torch.ops.moecomm while it is traced, so tensors of the tracer are allowed.

    Raises
    ------
    InvalidArgument
        The value is not a tensor, is a subclass other than Parameter and AsyncCollectiveTensor (which is waited for),
        is inside a function transform or forward-mode AD, or is nested, sparse, a negated view or without memory.
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
    if torch.compiler.is_dynamo_compiling():  # dynamo checks its own tensors
        return value
    _check_transforms(op, name, value, rank)
    if value.is_nested:
        refuse(op, f"{name} is a nested tensor; expected a dense one, such as its values()", rank)
    if value.layout != torch.strided:
        refuse(op, f"{name} is {value.layout}; expected a dense tensor", rank)
    if value.is_neg():  # the memory has the numbers with the opposite sign
        refuse(op, f"{name} is a negated view (of a conjugate); expected its resolve_neg()", rank)
    if value.device.type in ("cpu", "cuda") and not _has_memory(value):
        refuse(
            op,
            f"{name} is a tensor {list(value.shape)} whose storage holds {value.untyped_storage().nbytes()} bytes, too "
            "few for its values; expected a tensor whose storage has not been freed or resized (FSDP frees parameters "
            "between their uses)",
            rank,
        )
    return value


def wants_gradient(a: object, b: object = None) -> bool:
    """Whether autograd would record an operation on a or b."""
    if _grad_enabled():  # on the fast path of decode: no attribute lookup on None
        return getattr(a, "requires_grad", False) or (b is not None and getattr(b, "requires_grad", False))
    return False


def refuse_gradients(
    op: str, instead: str = "", *, rank: int | None = None, **tensors: torch.Tensor | None
) -> None:
    """Refuse tensors that require a gradient, which the call would drop.

    Parameters
    ----------
    op : str
        Name of the call, for the error text.
    instead : str
        Text about what the caller can do other than detach the tensor.
    rank : int, optional
        This rank, for the error text.
    tensors : Tensor or None
        By the names of the arguments.

    Raises
    ------
    InvalidArgument
        Gradients are enabled and a tensor requires one.
    """
    for name, t in tensors.items():
        if wants_gradient(t):
            refuse(
                op,
                f"{name} requires a gradient, but {op} is not differentiable; pass {name}.detach(){instead}",
                rank,
            )


def address(t: torch.Tensor | None) -> int:
    """Return the address of a tensor's first element. 0 for None and for a tensor without elements.

    Raises
    ------
    InvalidArgument
        The tensor has elements but no memory. Address 0 would mean that it is not given.
    """
    if t is None:
        return 0
    at = t.data_ptr()
    if at == 0 and t.numel():
        refuse(
            "moecomm",
            f"a tensor {t.dtype} {list(t.shape)} on {t.device} has no memory; expected a tensor with memory",
        )
    return at


def _from_dlpack(op: str, name: str, value: Any, rank: int | None, written: bool) -> Any:
    why = ""
    readonly = (
        getattr(getattr(value, "flags", None), "writeable", True) is False
    )  # NumPy's flag; torch drops it
    if hasattr(value, "__dlpack__"):
        try:
            value = torch.from_dlpack(value)  # type: ignore[attr-defined]
        except (TypeError, RuntimeError, BufferError, ValueError) as error:
            why = f" ({error})"
    if not isinstance(value, torch.Tensor):
        refuse(op, f"{name} is a {type(value).__qualname__}; expected a tensor or a DLPack array{why}", rank)
    if written and readonly:
        refuse(op, f"{name} is a read-only array; expected a writable one", rank)
    return value


def _is_traced(value: Any) -> bool:
    """Whether the tensor belongs to a tracer: torch.export, make_fx or a FakeTensorMode."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
        return False
    return isinstance(
        value, (torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor)
    )


def class_of(module: str, name: str) -> Any:
    """Return a class of a module, or () if the module is not imported."""
    return getattr(sys.modules.get(module), name, ())


def _unwrap(op: str, name: str, value: Any, rank: int | None) -> Any:
    """Return the plain tensor of a subclass, if it has one."""
    if isinstance(value, class_of("torch.distributed._functional_collectives", "AsyncCollectiveTensor")):
        wait = _Wait.apply if value.requires_grad and torch.is_grad_enabled() else _Wait.of
        return plain(op, name, wait(value), rank=rank)
    if isinstance(value, class_of("torch.distributed.tensor", "DTensor")):
        refuse(op, f"{name} is a DTensor; expected a plain tensor, such as {name}.to_local()", rank)
    if isinstance(value, torch._subclasses.FakeTensor):
        refuse(
            op,
            f"{name} is a FakeTensor, which has no memory; expected a tensor with values, or a dispatch or combine "
            "inside torch.compile or torch.export",
            rank,
        )
    if value.is_nested:
        refuse(op, f"{name} is a nested tensor; expected a dense one, such as its values()", rank)
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or torch.nn.parameter.is_lazy(
        value
    ):
        refuse(
            op,
            f"{name} is a {type(value).__qualname__}, a tensor subclass that may lack memory; expected a plain tensor",
            rank,
        )
    with torch._C.DisableTorchFunctionSubclass():  # such a subclass only changes methods, not the memory
        return value.as_subclass(torch.Tensor)


class _Wait(torch.autograd.Function):
    """Waits for the result of a collective, differentiably."""

    @staticmethod
    def of(value: Any) -> Any:
        """Wait without gradients."""
        return value.wait()

    @staticmethod
    def forward(ctx: Any, value: Any) -> Any:
        return value.wait()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad


def _check_transforms(op: str, name: str, value: Any, rank: int | None) -> None:
    """Refuse tensors of function transforms. A collective call cannot be batched and has no forward derivative."""
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
            f"{name} is a tensor inside {where}, which moecomm does not support; expected a plain tensor (for "
            "gradients use backward() or torch.autograd.grad, for batches one call with all tokens)",
            rank,
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        refuse(
            op,
            f"{name} is a dual tensor of forward-mode AD, which moecomm does not support; expected a plain tensor "
            "(see torch.autograd.forward_ad.unpack_dual), or use reverse mode",
            rank,
        )


def _has_memory(t: torch.Tensor) -> bool:
    if t.numel() == 0:
        return True
    last = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
    return t.data_ptr() != 0 and t.untyped_storage().nbytes() >= (last + 1) * t.element_size()


def picks_of(experts: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """Which picks are of these experts (bool [num_experts]): bool [T, top_k]."""
    exists = (topk_ids >= 0) & (topk_ids < len(experts))
    return experts[topk_ids.clamp(0, len(experts) - 1).long()] & exists
