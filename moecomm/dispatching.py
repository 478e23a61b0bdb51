"""The path of a dispatch: directly to the native call if possible, else through all checks to it or to an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from . import ops
from .making import open_by_call, require_num_experts
from .opaque import Opaque
from .refusals import take_part
from .results import Dispatched, Handle, dispatched_of
from .shapes import as_int
from .windows import TooSmall

if TYPE_CHECKING:
    from .backend import Backend
    from .calls import Calls


class DispatchPath:
    """Implements Buffer.dispatch, which documents it."""

    def __init__(self, backend: Backend, calls: Calls) -> None:
        self._backend, self._calls = backend, calls
        self._memory, self._checks = backend.memory, backend.checks

    def dispatch(
        self,
        x: Any,
        topk_ids: Any,
        topk_weights: Any,
        layout: Any,
        expert_alignment: Any,
        quant: Any,
        scale_layout: Any,
        handle: Any,
        capacity: Any,
        async_op: bool,
        check: bool,
        layer: Any,
        num_experts: Any,
    ) -> Any:
        """See Buffer.dispatch.

        Raises
        ------
        MoecommError
        """
        backend = self._backend
        fast = backend.fast
        if (
            fast is not None
            and self._memory.comm.order.ready
            and handle is None
            and quant is None
            and capacity is None
            and not async_op
            and not check
            and scale_layout == "row"
            and (num_experts is None or num_experts == self._memory.num_experts)
            and not is_dynamo_compiling()
        ):
            try:
                done = fast.try_dispatch(x, topk_ids, topk_weights, layout, expert_alignment)
                if type(done) is tuple:
                    return dispatched_of(backend, fast, layout, done)
                if done is not None:
                    backend.fail("dispatch", done)
            except TooSmall as small:  # on all ranks; they repeat the call with larger memory
                backend.grow("dispatch", x.shape[0], small.failure)
        self._memory.require_open("dispatch")
        call = (
            x,
            topk_ids,
            topk_weights,
            layout,
            expert_alignment,
            quant,
            scale_layout,
            handle,
            capacity,
            async_op,
            check,
            layer,
            num_experts,
        )
        if is_dynamo_compiling():
            return self._dispatch(*call)
        return take_part(backend, "dispatch", handle, self._dispatch, *call)

    def _dispatch(
        self,
        x: Any,
        topk_ids: Any,
        topk_weights: Any,
        layout: Any,
        expert_alignment: Any,
        quant: Any,
        scale_layout: Any,
        handle: Any,
        capacity: Any,
        async_op: bool,
        check: bool,
        layer: Any,
        num_experts: Any,
    ) -> Any:
        op, checks, memory, router = "dispatch", self._checks, self._memory, self._backend.router
        expert_alignment, capacity = as_int(expert_alignment), as_int(capacity)
        if memory.native is None:
            open_by_call(self._backend, op, x, topk_ids, num_experts, handle)
        else:
            require_num_experts(self._backend, op, num_experts)
        opaque = x if isinstance(x, Opaque) else None
        x, scales = (opaque.rows, opaque.packed_sides()) if opaque else checks.as_rows(op, x)
        if handle is not None:
            if layout != "expert" or expert_alignment != 1 or capacity is not None:
                checks.refuse(
                    op, "layout, expert_alignment and capacity come from the handle; expected them left out"
                )
            checks.handle(op, handle)
            layout, capacity = handle.layout, handle.capacity
        topk_ids = checks.as_tensor(op, "topk_ids", topk_ids, optional=True)
        topk_weights = checks.as_tensor(op, "topk_weights", topk_weights, optional=True)
        checks.dispatch(x, scales, topk_ids, topk_weights, layout, expert_alignment, capacity, handle, opaque)
        if opaque is None:
            checks.quant(op, quant, scale_layout, scales)
        elif quant is not None or scale_layout != "row":
            checks.refuse(
                op,
                f"quant is {quant!r} and scale_layout {scale_layout!r} for opaque rows; expected None and 'row'",
            )
        if check:
            checks.numbers(op, topk_weights)
        lost = None
        if router is not None and handle is None:
            router.require_layer(op, layer)
            topk_weights, lost = router.account(topk_ids, topk_weights, router.gone(layer))
        if ops.wanted(x, topk_weights) or (opaque is not None and opaque.requires_grad()):
            self._require_differentiable(x, scales, quant, scale_layout, opaque)
            return self._calls.run(
                op,
                self._by_operator,
                async_op,
                True,
                x,
                scales,
                topk_ids,
                topk_weights,
                layout,
                expert_alignment,
                capacity,
                handle,
                lost,
                layer,
            )
        return self._calls.run(
            op,
            self._backend.dispatch,
            async_op,
            False,
            x,
            scales,
            topk_ids,
            topk_weights,
            layout,
            expert_alignment,
            capacity,
            handle,
            quant,
            scale_layout == "column",
            lost,
            layer,
            opaque,
        )

    def _require_differentiable(
        self, x: torch.Tensor, scales: Any, quant: str | None, scale_layout: str, opaque: Opaque | None
    ) -> None:
        """Refuse arguments without a derivative if a gradient is needed or a graph is traced."""
        op, refuse = "dispatch", self._checks.refuse
        if opaque is not None:
            refuse(
                op,
                "x is opaque, but a gradient is required or a graph is traced; expected a tensor, or no gradients",
            )
        if scales is not None and x.requires_grad:
            refuse(op, "x is quantized and requires a gradient, but FP8 rows have none; expected x.detach()")
        if quant is not None or scale_layout != "row":
            refuse(
                op,
                f"quant is {quant!r} and scale_layout {scale_layout!r}, but a gradient is required or a graph is "
                "traced; expected None and 'row', since FP8 rows have no gradient (docs/training.md shows a dispatch "
                "with a custom backward)",
            )

    def _by_operator(
        self,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        layout: str,
        expert_alignment: int,
        capacity: int | None,
        handle: Handle | None,
        lost: torch.Tensor | None = None,
        layer: int = 0,
    ) -> Dispatched:
        backend = self._backend
        if handle is not None:
            rows, row_scales, weights, ids, source = ops.redispatch(
                x, topk_weights, scales, handle.tensor(), ops.name_in_graph(backend), layout, handle.num_rows
            )
        else:
            rows, row_scales, weights, ids, source, tokens, padded, ticket = ops.dispatch(
                x,
                topk_ids,
                topk_weights,
                scales,
                ops.name_in_graph(backend),
                layout,
                expert_alignment,
                capacity,
                layer,
            )
            handle = Handle(
                backend, layout, capacity, rows.shape[0], x.shape[0], tensor=ticket, counts=(tokens, padded)
            )
        out = Dispatched(handle, lost)
        out.x, out.scales, out.topk_weights, out.source = (
            rows,
            None if scales is None else row_scales,
            weights,
            source,
        )
        out.topk_ids = None if handle.layout == "expert" else ids
        return out
