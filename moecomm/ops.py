"""torch.ops.moecomm: dispatch and combine as operators, with shapes for tracing and with derivatives.

Buffer.dispatch and Buffer.combine use these operators if a gradient is required or a graph is traced. The arguments of
an operator include a Buffer as a name, that of its Backend, and a handle as an int64 tensor [1] on the host that keeps
the plan alive, so that no operator reads device memory to find them.

    dispatch        a new plan                                    backward: combine_slots
    redispatch      the same plan again                           backward: the same
    combine         weighted sum at the tokens, plus a bias       backward: redispatch of y's gradient
    combine_slots   plain sum, and `back` [N] or [N, top_k]       backward: redispatch of y's and the slots' gradients
                    to the picks that the rows came from

Every backward is a separate collective call: all ranks must run them in the same order. This is the case if they run
the same model on graphs of the same shape, with any numbers of tokens, including zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import functools
import itertools
import weakref

import torch

from .errors import InvalidArgument
from .refusals import Part
from .tensors import refuse
from .tickets import Ticket as Ticket
from .tickets import ticket_of as ticket_of
from .tickets import ticket_with

if TYPE_CHECKING:
    from .backend import Backend


_numbers = itertools.count(1)
_backends: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


def name_backend(backend: Backend, name: str | None = None) -> str:
    """Name a Backend for the operators of this process. `name`: that of the Backend that it replaces."""
    backend.name = f"#{next(_numbers)}" if name is None else name
    _backends[backend.name] = backend
    return backend.name


def name_in_graph(backend: Backend) -> str:
    """Return the name of a Backend in a graph: its shape for torch.export, whose program may run in another process."""
    return _shape_name(backend) if torch.compiler.is_exporting() else backend.name


def _shape_name(backend: Backend) -> str:
    m = backend.memory
    kind = "" if backend.router is None else " placement"
    return f"hidden={m.hidden} num_experts={m.num_experts} top_k={m.top_k} dtype={m.dtype} ranks={m.comm.size}{kind}"


def backend_of(name: str) -> Backend:
    """Return the Backend with this name, or of those with this shape the one with the most tokens.

    Raises
    ------
    InvalidArgument
        There is none, or there are several communicators with one.
    """
    found: Backend | None = _backends.get(name)
    if found is not None:
        return found
    living: list[Backend] = [
        b for b in list(_backends.values()) if not b.memory.closed and _shape_name(b) == name
    ]
    if not living:
        raise InvalidArgument(
            f"buffer: no living Buffer is {name!r}; expected one made before the program runs",
            op="ops",
        )
    if len({id(b.memory.comm) for b in living}) > 1:
        raise InvalidArgument(
            f"buffer: Buffers of several communicators are {name!r}; expected one communicator where an "
            "exported program runs",
            op="ops",
        )
    return max(living, key=lambda b: b.memory.max_tokens or 0)


def wanted(*tensors: torch.Tensor | None) -> bool:
    """Whether a call must use the operators: traced or compiled, inside a mode, or with gradients."""
    if torch.is_grad_enabled():
        for t in tensors:
            if getattr(t, "requires_grad", False):
                return True
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


# -- dispatch: a new plan -------------------------------------------------------------------------------


def _dispatch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    buffer: str,
    layout: str,
    expert_alignment: int,
    capacity: int | None,
    layer: int = 0,
) -> Any:
    b = _open_backend("dispatch", buffer)
    with Part(b, "dispatch"):
        _require_plain(b, "dispatch", x=x, topk_ids=topk_ids, topk_weights=topk_weights, scales=scales)
        b.checks.dispatch(x, scales, topk_ids, topk_weights, layout, expert_alignment, capacity)
        out = b.dispatch(x, scales, topk_ids, topk_weights, layout, expert_alignment, capacity, layer=layer)
    return (
        out.x,
        x.new_empty(0, dtype=torch.float32) if scales is None else out.scales,
        out.topk_weights,
        *_picks_of(out),
        out.tokens_per_expert,
        out.rows_per_expert,
        out.handle.tensor(),
    )


def _dispatch_fake(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    buffer: str,
    layout: str,
    expert_alignment: int,
    capacity: int | None,
    layer: int = 0,
) -> Any:
    memory = backend_of(buffer).memory
    n = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    by_rank = layout == "rank"
    counts = topk_ids.new_empty(memory.experts_per_rank, dtype=torch.int64, device=memory.comm.device)
    return (
        x.new_empty(n, x.shape[1]),
        x.new_empty(0, dtype=torch.float32) if scales is None else scales.new_empty(n, scales.shape[1]),
        x.new_empty((n, memory.top_k) if by_rank else (n,), dtype=torch.float32),
        x.new_empty((n, memory.top_k) if by_rank else (0,), dtype=torch.int64),
        x.new_empty(n, dtype=torch.int64),
        counts,
        torch.empty_like(counts),
        counts.new_empty(1, device="cpu"),
    )


def _dispatch_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, topk_weights, scales, ctx.buffer, ctx.layout, *_ = inputs
    ctx.tokens, ctx.weighted, ctx.quantized = x.shape[0], topk_weights is not None, scales is not None
    _save(ctx, output[-1])


def _dispatch_backward(
    ctx: Any, rows: torch.Tensor, _scales: torch.Tensor, weights: torch.Tensor, *_: Any
) -> Any:
    x, weights = _to_tokens(ctx, rows, weights)
    return x, None, weights, None, None, None, None, None, None


def _picks_of(out: Any) -> Any:
    """Return ids (empty in the expert layout) and source of a dispatch."""
    return out.x.new_empty(0, dtype=torch.int64) if out.topk_ids is None else out.topk_ids, out.source


def _to_tokens(ctx: Any, rows: torch.Tensor, weights: torch.Tensor) -> Any:
    """Sum the gradients of received rows and weights at the tokens that they came from.

    The gradients of weights are sent even if this rank gave no weights: other ranks' tokens may have some.
    """
    (handle,) = ctx.saved_tensors
    if ctx.quantized:  # the rows have no gradient, but the gradients of weights are sent with rows
        rows = rows.new_zeros(rows.shape, dtype=backend_of(ctx.buffer).memory.dtype)
    x, weights = combine_slots(
        rows.contiguous(), weights.contiguous(), handle, ctx.buffer, ctx.layout, ctx.tokens
    )
    return None if ctx.quantized else x, weights if ctx.weighted else None


# -- redispatch: the plan of an earlier dispatch ---------------------------------------------------------


def _redispatch(
    x: torch.Tensor,
    topk_weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    handle: torch.Tensor,
    buffer: str,
    layout: str,
    num_rows: int,
) -> Any:
    b = _open_backend("dispatch", buffer)
    with Part(b, "dispatch", handle) as part:
        h = part.handle = _handle_of(b, handle)
        _require_plain(b, "dispatch", x=x, topk_weights=topk_weights, scales=scales)
        b.checks.dispatch(x, scales, None, topk_weights, h.layout, 1, None, h)
        out = b.dispatch(x, scales, None, topk_weights, h.layout, 1, None, h)
    return (
        out.x,
        x.new_empty(0, dtype=torch.float32) if scales is None else out.scales,
        out.topk_weights,
        *_picks_of(out),
    )


def _redispatch_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    handle: torch.Tensor,
    buffer: str,
    layout: str,
    num_rows: int,
) -> Any:
    shape = (num_rows, backend_of(buffer).memory.top_k) if layout == "rank" else (num_rows,)
    return (
        x.new_empty(num_rows, x.shape[1]),
        x.new_empty(0, dtype=torch.float32)
        if scales is None
        else scales.new_empty(num_rows, scales.shape[1]),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape if layout == "rank" else (0,), dtype=torch.int64),
        x.new_empty(num_rows, dtype=torch.int64),
    )


def _redispatch_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, topk_weights, scales, handle, ctx.buffer, ctx.layout, _ = inputs
    ctx.tokens, ctx.weighted, ctx.quantized = x.shape[0], topk_weights is not None, scales is not None
    _save(ctx, handle)


def _redispatch_backward(
    ctx: Any, rows: torch.Tensor, _scales: torch.Tensor, weights: torch.Tensor, *_: Any
) -> Any:
    x, weights = _to_tokens(ctx, rows, weights)
    return x, weights, None, None, None, None, None


# -- combine: weighted sum at the tokens -----------------------------------------------------------------


def _combine(
    rows: torch.Tensor,
    topk_weights: torch.Tensor | None,
    bias: torch.Tensor | None,
    handle: torch.Tensor,
    buffer: str,
    layout: str,
    num_tokens: int,
    wire: str | None = None,
) -> Any:
    b = _open_backend("combine", buffer)
    with Part(b, "combine", handle) as part:
        h = part.handle = _handle_of(b, handle)
        _require_plain(b, "combine", rows=rows, topk_weights=topk_weights, bias=bias)
        b.checks.combine(rows, h, topk_weights, bias, wire=wire)
        return b.combine(rows, h, topk_weights, bias, wire=wire)


def _combine_fake(
    rows: torch.Tensor,
    topk_weights: torch.Tensor | None,
    bias: torch.Tensor | None,
    handle: torch.Tensor,
    buffer: str,
    layout: str,
    num_tokens: int,
    wire: str | None = None,
) -> Any:
    return rows.new_empty(num_tokens, rows.shape[1])


def _combine_context(ctx: Any, inputs: Any, output: Any) -> None:
    rows, topk_weights, bias, handle, ctx.buffer, ctx.layout, *_ = inputs
    ctx.bias = None if bias is None else (bias.dim(), bias.dtype)
    ctx.num_rows, ctx.weighted = rows.shape[0], topk_weights is not None
    _save(ctx, handle, *((rows, topk_weights) if ctx.weighted else ()))


def _combine_backward(ctx: Any, y: torch.Tensor) -> Any:
    grad_bias = None
    if ctx.bias and ctx.needs_input_grad[2]:
        dims, dtype = ctx.bias
        grad_bias = y.to(dtype) if dims == 2 else y.sum(0, dtype=_wide(y.dtype)).to(dtype)
    handle, *saved = ctx.saved_tensors
    grad, *_ = redispatch(y.contiguous(), None, None, handle, ctx.buffer, ctx.layout, ctx.num_rows)
    grad_weights = None
    if ctx.weighted:
        rows, weights = saved
        if ctx.needs_input_grad[1]:
            grad_weights = (rows.to(_wide(rows.dtype)) * grad).sum(-1).to(weights.dtype)
        grad = (weights[:, None] * grad).to(rows.dtype)
    # The wire format rounds: its derivative counts as 1.
    return grad, grad_weights, grad_bias, None, None, None, None, None


# -- combine_slots: the plain sum, and one number per row back to the pick that it came from --------------


def _combine_slots(
    rows: torch.Tensor, back: torch.Tensor, handle: torch.Tensor, buffer: str, layout: str, num_tokens: int
) -> Any:
    b = _open_backend("combine", buffer)
    with Part(b, "combine", handle) as part:
        h = part.handle = _handle_of(b, handle)
        _require_plain(b, "combine_slots", rows=rows, back=back)
        b.checks.combine(rows, h, None, None)
        b.checks.staging("combine_slots", rows, h, back=back)
        b.checks.back(back, h)
        return b.combine(rows, h, None, None, back=back)


def _combine_slots_fake(
    rows: torch.Tensor, back: torch.Tensor, handle: torch.Tensor, buffer: str, layout: str, num_tokens: int
) -> Any:
    return rows.new_empty(num_tokens, rows.shape[1]), back.new_empty(
        num_tokens, backend_of(buffer).memory.top_k
    )


def _combine_slots_context(ctx: Any, inputs: Any, output: Any) -> None:
    rows, _, handle, ctx.buffer, ctx.layout, _ = inputs
    ctx.num_rows = rows.shape[0]
    _save(ctx, handle)


def _combine_slots_backward(ctx: Any, y: torch.Tensor, slots: torch.Tensor) -> Any:
    (handle,) = ctx.saved_tensors
    rows, _, back, *_ = redispatch(
        y.contiguous(), slots.contiguous(), None, handle, ctx.buffer, ctx.layout, ctx.num_rows
    )
    return rows, back, None, None, None, None


def _save(ctx: Any, handle: torch.Tensor, *tensors: Any) -> None:
    """Save tensors for backward.

    Hooks on saved tensors may keep copies (torch.autograd.graph.save_on_cpu). Then the ticket of the original handle
    is kept, too, because a copy refers to it. This does not apply to checkpoint's hooks, which keep no copies and
    compute again.
    """
    ctx.save_for_backward(handle, *tensors)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    copied = (
        hooks is not None
        and getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint"
        and type(handle) is torch.Tensor
    )  # not one of a tracer
    ctx.ticket = ticket_with(int(handle)) if copied else None


def _through(backward: Any) -> Any:
    """Return a backward that then frees the ticket kept for copies, unless the graph is kept.

    Saved tensors are freed at the same time.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        result = backward(ctx, *grads)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.ticket = None
        return result

    return run


def _wide(dtype: torch.dtype) -> Any:
    return torch.promote_types(dtype, torch.float32)


def _open_backend(op: str, name: str) -> Any:
    b = backend_of(name)
    b.memory.require_open(op)
    b.memory.comm.order.settle()
    return b


def _handle_of(backend: Backend, handle: torch.Tensor) -> Any:
    ticket = ticket_of(handle)
    return backend.handle_of(ticket.layout, ticket.capacity, ticket.plan, ticket.output, ticket.native)


def _require_plain(b: Any, op: str, **tensors: Any) -> None:
    for name, t in tensors.items():
        b.checks.as_tensor(op, name, t, optional=True)


def _refuse_vmap(name: str, *_: Any) -> None:
    refuse(
        name,
        "an argument is a tensor inside torch.func.vmap, which moecomm does not support; expected one call with all "
        "tokens",
    )


def _define(name: str, run: Any, fake: Any, context: Any, backward: Any, schema: str) -> Any:
    op = torch.library.custom_op(f"moecomm::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op.register_autograd(_through(backward), setup_context=context)
    op.register_vmap(functools.partial(_refuse_vmap, name))
    return getattr(torch.ops.moecomm, name)


# The operators. `buffer` is Buffer.name, or for torch.export its shape; layout, num_rows and num_tokens repeat what the
# handle says, so that shapes are known without it. Outputs that do not apply are empty.
dispatch = _define(
    "dispatch",
    _dispatch,
    _dispatch_fake,
    _dispatch_context,
    _dispatch_backward,
    "(Tensor x, Tensor topk_ids, Tensor? topk_weights, Tensor? scales, str buffer, str layout, int expert_alignment,"
    " int? capacity, int layer=0)"
    " -> (Tensor x, Tensor scales, Tensor topk_weights, Tensor topk_ids, Tensor source, Tensor tokens_per_expert,"
    " Tensor rows_per_expert, Tensor handle)",
)
redispatch = _define(
    "redispatch",
    _redispatch,
    _redispatch_fake,
    _redispatch_context,
    _redispatch_backward,
    "(Tensor x, Tensor? topk_weights, Tensor? scales, Tensor handle, str buffer, str layout, SymInt num_rows)"
    " -> (Tensor x, Tensor scales, Tensor topk_weights, Tensor topk_ids, Tensor source)",
)
combine = _define(
    "combine",
    _combine,
    _combine_fake,
    _combine_context,
    _combine_backward,
    "(Tensor rows, Tensor? topk_weights, Tensor? bias, Tensor handle, str buffer, str layout, SymInt num_tokens,"
    " str? wire=None) -> Tensor",
)
combine_slots = _define(
    "combine_slots",
    _combine_slots,
    _combine_slots_fake,
    _combine_slots_context,
    _combine_slots_backward,
    "(Tensor rows, Tensor back, Tensor handle, str buffer, str layout, SymInt num_tokens) -> (Tensor y, Tensor slots)",
)
