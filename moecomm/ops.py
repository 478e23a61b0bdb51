"""torch.ops.moecomm: dispatch and combine as operators, with shapes for tracing and with derivatives.

Buffer.dispatch and Buffer.combine go through these operators whenever a gradient is wanted or a graph is
traced, and past them otherwise. A Buffer crosses as its number, a handle as an int64 tensor [1] on the host
that keeps the plan alive: no operator looks at device memory to find what it needs.

    dispatch        a new plan                                    backward: combine_slots
    redispatch      the same plan again                           backward: the same
    combine         weighted sum at the tokens, plus a bias       backward: redispatch of y's gradient
    combine_slots   plain sum, and `back` [N] or [N, top_k]       backward: redispatch of y's and the slots' gradients
                    to the picks that the rows came from

Every backward is a collective call of its own: all ranks must run them, in the same order. They do when
they run the same model on graphs of the same shape, whatever their numbers of tokens, zero included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ctypes
import functools
import itertools
import weakref

import torch

from .errors import InvalidArgument
from .refusals import Part
from .tensors import refuse

if TYPE_CHECKING:
    from .buffer import Buffer


_numbers = itertools.count(1)
_buffers = weakref.WeakValueDictionary()
_tickets = weakref.WeakValueDictionary()


class Ticket(ctypes.Structure):
    """The memory behind a handle tensor: a number, and with it all that combine needs.

    A tensor made by torch.frombuffer keeps its exporter, so a plan lives exactly as long as some tensor
    with this storage does, whoever saved it: autograd, a checkpoint or a compiled graph.
    """

    _fields_ = [("number", ctypes.c_int64)]

    def __init__(self, buffer: Buffer, layout: str, capacity: int | None, plan: Any, output: Any) -> None:
        super().__init__(next(_numbers))
        self.buffer, self.layout, self.capacity, self.plan, self.output = (
            buffer,
            layout,
            capacity,
            plan,
            output,
        )

    def tensor(self) -> torch.Tensor:
        """int64 [1] on the host. Only from here on is the number known: most handles never become a tensor."""
        _tickets[self.number] = self
        return torch.frombuffer(self, dtype=torch.int64)


def ticket_of(handle: torch.Tensor) -> Ticket:
    """The Ticket that an int64 tensor [1] stands for.

    Raises
    ------
    InvalidArgument
        Its dispatch is forgotten: the tensor is a copy, and the original is gone (in a compiled graph, hooks that copy saved tensors
        do that).
    """
    found = _tickets.get(int(handle))
    if found is None:
        raise InvalidArgument(
            f"handle: number {int(handle)} is not (or no longer) the handle of a dispatch; keep the tensor that dispatch "
            "returned, not a copy of it",
            op="ops",
        )
    return found


def number_buffer(buffer: Buffer) -> int:
    """A process-wide number under which operators find this Buffer."""
    number = next(_numbers)
    _buffers[number] = buffer
    return number


def buffer_of(number: int) -> Buffer:
    """The Buffer with this number.

    Raises
    ------
    InvalidArgument
        There is none.
    """
    found = _buffers.get(number)
    if found is None:
        raise InvalidArgument(f"buffer: {number} is the number of no living Buffer", op="ops")
    return found


def wanted(*tensors: torch.Tensor | None) -> bool:
    """Whether a call must go through the operators: traced or compiled, seen by a mode, or with gradients."""
    if torch.is_grad_enabled():
        for t in tensors:
            if getattr(t, "requires_grad", False):
                return True
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


# -- dispatch: a new plan -------------------------------------------------------------------------------


def _dispatch(x, topk_ids, topk_weights, scales, buffer, layout, expert_alignment, capacity, layer=0):
    b = _open_buffer("dispatch", buffer)
    with Part(b, "dispatch"):
        _require_plain(b, "dispatch", x=x, topk_ids=topk_ids, topk_weights=topk_weights, scales=scales)
        b._check_dispatch(x, scales, topk_ids, topk_weights, layout, expert_alignment, capacity)
        out = b._dispatch_natively(
            x, scales, topk_ids, topk_weights, layout, expert_alignment, capacity, layer=layer
        )
    return (
        out.x,
        x.new_empty(0, dtype=torch.float32) if scales is None else out.scales,
        out.topk_weights,
        *_picks_of(out),
        out.tokens_per_expert,
        out.rows_per_expert,
        out.handle.tensor(),
    )


def _dispatch_fake(x, topk_ids, topk_weights, scales, buffer, layout, expert_alignment, capacity, layer=0):
    b = buffer_of(buffer)
    n = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    by_rank = layout == "rank"
    counts = topk_ids.new_empty(b.experts_per_rank, dtype=torch.int64, device=b.comm.device)
    return (
        x.new_empty(n, x.shape[1]),
        x.new_empty(0, dtype=torch.float32) if scales is None else scales.new_empty(n, scales.shape[1]),
        x.new_empty((n, b.top_k) if by_rank else (n,), dtype=torch.float32),
        x.new_empty((n, b.top_k) if by_rank else (0,), dtype=torch.int64),
        x.new_empty(n, dtype=torch.int64),
        counts,
        torch.empty_like(counts),
        counts.new_empty(1, device="cpu"),
    )


def _dispatch_context(ctx, inputs, output):
    x, _, topk_weights, scales, ctx.buffer, ctx.layout, *_ = inputs
    ctx.tokens, ctx.weighted, ctx.quantized = x.shape[0], topk_weights is not None, scales is not None
    _save(ctx, output[-1])


def _dispatch_backward(ctx, rows, _scales, weights, *_):
    x, weights = _to_tokens(ctx, rows, weights)
    return x, None, weights, None, None, None, None, None, None


def _picks_of(out):
    """Ids (empty in the expert layout) and source of what was dispatched."""
    return out.x.new_empty(0, dtype=torch.int64) if out.topk_ids is None else out.topk_ids, out._source


def _to_tokens(ctx, rows, weights):
    """Gradients of received rows and weights, summed at the tokens that they came from.

    The weights' gradients travel even where this rank gave none: another rank's tokens may have theirs from rows here.
    """
    (handle,) = ctx.saved_tensors
    if ctx.quantized:  # the rows carry no gradient, the weights' gradients still travel with rows
        rows = rows.new_zeros(rows.shape, dtype=buffer_of(ctx.buffer).dtype)
    x, weights = combine_slots(
        rows.contiguous(), weights.contiguous(), handle, ctx.buffer, ctx.layout, ctx.tokens
    )
    return None if ctx.quantized else x, weights if ctx.weighted else None


# -- redispatch: the plan of an earlier dispatch ---------------------------------------------------------


def _redispatch(x, topk_weights, scales, handle, buffer, layout, num_rows):
    b = _open_buffer("dispatch", buffer)
    with Part(b, "dispatch", handle):
        h = _handle_of(b, handle)
        _require_plain(b, "dispatch", x=x, topk_weights=topk_weights, scales=scales)
        b._check_dispatch(x, scales, None, topk_weights, h.layout, 1, None, h)
        out = b._dispatch_natively(x, scales, None, topk_weights, h.layout, 1, None, h)
    return (
        out.x,
        x.new_empty(0, dtype=torch.float32) if scales is None else out.scales,
        out.topk_weights,
        *_picks_of(out),
    )


def _redispatch_fake(x, topk_weights, scales, handle, buffer, layout, num_rows):
    shape = (num_rows, buffer_of(buffer).top_k) if layout == "rank" else (num_rows,)
    return (
        x.new_empty(num_rows, x.shape[1]),
        x.new_empty(0, dtype=torch.float32)
        if scales is None
        else scales.new_empty(num_rows, scales.shape[1]),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape if layout == "rank" else (0,), dtype=torch.int64),
        x.new_empty(num_rows, dtype=torch.int64),
    )


def _redispatch_context(ctx, inputs, output):
    x, topk_weights, scales, handle, ctx.buffer, ctx.layout, _ = inputs
    ctx.tokens, ctx.weighted, ctx.quantized = x.shape[0], topk_weights is not None, scales is not None
    _save(ctx, handle)


def _redispatch_backward(ctx, rows, _scales, weights, *_):
    x, weights = _to_tokens(ctx, rows, weights)
    return x, weights, None, None, None, None, None


# -- combine: weighted sum at the tokens -----------------------------------------------------------------


def _combine(rows, topk_weights, bias, handle, buffer, layout, num_tokens, wire=None):
    b = _open_buffer("combine", buffer)
    with Part(b, "combine", handle):
        h = _handle_of(b, handle)
        _require_plain(b, "combine", rows=rows, topk_weights=topk_weights, bias=bias)
        b._check_combine(rows, h, topk_weights, bias, wire=wire)
        return b._combine_natively(rows, h, topk_weights, bias, wire=wire)


def _combine_fake(rows, topk_weights, bias, handle, buffer, layout, num_tokens, wire=None):
    return rows.new_empty(num_tokens, rows.shape[1])


def _combine_context(ctx, inputs, output):
    rows, topk_weights, bias, handle, ctx.buffer, ctx.layout, *_ = inputs
    ctx.bias = None if bias is None else (bias.dim(), bias.dtype)
    ctx.num_rows, ctx.weighted = rows.shape[0], topk_weights is not None
    _save(ctx, handle, *((rows, topk_weights) if ctx.weighted else ()))


def _combine_backward(ctx, y):
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
    return (
        grad,
        grad_weights,
        grad_bias,
        None,
        None,
        None,
        None,
        None,
    )  # the wire rounds: its derivative counts as 1


# -- combine_slots: the plain sum, and one number per row back to the pick that it came from --------------


def _combine_slots(rows, back, handle, buffer, layout, num_tokens):
    b = _open_buffer("combine", buffer)
    with Part(b, "combine", handle):
        h = _handle_of(b, handle)
        _require_plain(b, "combine_slots", rows=rows, back=back)
        b._check_combine(rows, h, None, None)
        b._check_staging("combine_slots", rows, h, back=back)
        b._check_back(back, h)
        return b._combine_natively(rows, h, None, None, back=back)


def _combine_slots_fake(rows, back, handle, buffer, layout, num_tokens):
    return rows.new_empty(num_tokens, rows.shape[1]), back.new_empty(num_tokens, buffer_of(buffer).top_k)


def _combine_slots_context(ctx, inputs, output):
    rows, _, handle, ctx.buffer, ctx.layout, _ = inputs
    ctx.num_rows = rows.shape[0]
    _save(ctx, handle)


def _combine_slots_backward(ctx, y, slots):
    (handle,) = ctx.saved_tensors
    rows, _, back, *_ = redispatch(
        y.contiguous(), slots.contiguous(), None, handle, ctx.buffer, ctx.layout, ctx.num_rows
    )
    return rows, back, None, None, None, None


def _save(ctx, handle, *tensors):
    """Save for backward. Hooks on saved tensors may keep copies (torch.autograd.graph.save_on_cpu): the ticket of the original handle
    is then kept beside them, which a copy names as well. Not for checkpoint's hooks, which keep nothing and compute again."""
    ctx.save_for_backward(handle, *tensors)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    copied = (
        hooks is not None
        and getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint"
        and type(handle) is torch.Tensor
    )  # no tracer's
    ctx.ticket = _tickets.get(int(handle)) if copied else None


def _through(backward):
    """A backward, after which the ticket beside copies goes, unless the graph is kept. Saved tensors go in the same moment."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        result = backward(ctx, *grads)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.ticket = None
        return result

    return run


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def _open_buffer(op, number):
    b = buffer_of(number)
    b._require_open(op)
    b.comm._settle()
    return b


def _handle_of(buffer, handle):
    ticket = ticket_of(handle)
    return buffer._handle_of(ticket.layout, ticket.capacity, ticket.plan, ticket.output)


def _require_plain(b, op, **tensors):
    for name, t in tensors.items():
        b._as_tensor(op, name, t, optional=True)


def _refuse_vmap(name, *_):
    refuse(
        name,
        "an argument is a tensor inside torch.func.vmap; moecomm calls have no rule for it, expected one call of all tokens",
    )


def _define(name, run, fake, context, backward, schema):
    op = torch.library.custom_op(f"moecomm::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op.register_autograd(_through(backward), setup_context=context)
    op.register_vmap(functools.partial(_refuse_vmap, name))
    return getattr(torch.ops.moecomm, name)


# The operators. `buffer` is Buffer.number; layout, num_rows and num_tokens repeat what the handle says, so that shapes
# are known without it. Outputs that do not apply are empty.
dispatch = _define(
    "dispatch",
    _dispatch,
    _dispatch_fake,
    _dispatch_context,
    _dispatch_backward,
    "(Tensor x, Tensor topk_ids, Tensor? topk_weights, Tensor? scales, int buffer, str layout, int expert_alignment, int? capacity, int layer=0)"
    " -> (Tensor x, Tensor scales, Tensor topk_weights, Tensor topk_ids, Tensor source, Tensor tokens_per_expert,"
    " Tensor rows_per_expert, Tensor handle)",
)
redispatch = _define(
    "redispatch",
    _redispatch,
    _redispatch_fake,
    _redispatch_context,
    _redispatch_backward,
    "(Tensor x, Tensor? topk_weights, Tensor? scales, Tensor handle, int buffer, str layout, SymInt num_rows)"
    " -> (Tensor x, Tensor scales, Tensor topk_weights, Tensor topk_ids, Tensor source)",
)
combine = _define(
    "combine",
    _combine,
    _combine_fake,
    _combine_context,
    _combine_backward,
    "(Tensor rows, Tensor? topk_weights, Tensor? bias, Tensor handle, int buffer, str layout, SymInt num_tokens,"
    " str? wire=None) -> Tensor",
)
combine_slots = _define(
    "combine_slots",
    _combine_slots,
    _combine_slots_fake,
    _combine_slots_context,
    _combine_slots_backward,
    "(Tensor rows, Tensor back, Tensor handle, int buffer, str layout, SymInt num_tokens) -> (Tensor y, Tensor slots)",
)
