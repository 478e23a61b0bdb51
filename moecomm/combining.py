"""The path of a combine: directly to the native call if possible, else through all checks to it or to an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from . import ops
from ._native.core import Failure
from .making import open_by_call
from .refusals import take_part
from .results import Handle, parts_in

if TYPE_CHECKING:
    from .backend import Backend
    from .calls import Calls


class CombinePath:
    """Implements Buffer.combine, which documents it."""

    def __init__(self, backend: Backend, calls: Calls) -> None:
        self._backend, self._calls = backend, calls
        self._memory, self._checks = backend.memory, backend.checks

    def combine(
        self,
        rows: Any,
        handle: Any,
        topk_weights: Any,
        bias: Any,
        wire: Any,
        return_weights: bool,
        async_op: bool,
        check: bool,
        out: Any,
    ) -> Any:
        """See Buffer.combine.

        Raises
        ------
        MoecommError
        """
        backend = self._backend
        fast = backend.fast
        if (
            fast is not None
            and self._memory.comm.order.ready
            and bias is None
            and wire is None
            and not return_weights
            and not async_op
            and not check
            and not is_dynamo_compiling()
            and type(handle) is Handle
            and (held := parts_in(handle, fast)) is not None
        ):
            y = fast.try_combine(rows, *held, handle.num_rows, handle.num_tokens, topk_weights, out)
            if type(y) is Failure:
                backend.fail("combine", y)
            if y is not None:
                return y
        self._memory.require_open("combine")
        call = rows, handle, topk_weights, bias, wire, return_weights, async_op, check, out
        if is_dynamo_compiling():
            return self._combine(*call)
        return take_part(backend, "combine", handle, self._combine, *call)

    def _combine(
        self,
        rows: Any,
        handle: Any,
        topk_weights: Any,
        bias: Any,
        wire: Any,
        return_weights: bool,
        async_op: bool,
        check: bool,
        out: Any,
    ) -> Any:
        op, checks = "combine", self._checks
        if self._memory.native is None:
            open_by_call(self._backend, op, None, None, None, handle)
        checks.handle(op, handle)
        rows = checks.as_tensor(op, "rows", rows)
        topk_weights = checks.as_tensor(op, "topk_weights", topk_weights, optional=True)
        bias = checks.as_bias(op, bias, handle)
        out = checks.as_tensor(op, "out", out, optional=True, written=True)
        checks.combine(rows, handle, topk_weights, bias, out, wire, return_weights)
        if check:
            checks.numbers(op, topk_weights)
        through_ops = ops.wanted(rows, topk_weights, bias)
        if through_ops and out is not None:
            checks.refuse(op, "out is given, but a gradient is required or a graph is traced; expected None")
        if through_ops and return_weights:
            checks.refuse(
                op,
                "return_weights is True, but a gradient is required or a graph is traced; expected False, or no "
                "gradients (torch.ops.moecomm.combine_slots returns weights to their picks and is differentiable)",
            )
        run = self._calls.run
        if return_weights:
            weights = None if handle.layout == "rank" else topk_weights
            return run(
                op,
                self._with_weights,
                async_op,
                False,
                rows,
                handle,
                weights,
                bias,
                out,
                wire,
                topk_weights,
            )
        call = self._by_operator if through_ops else self._backend.combine
        return run(op, call, async_op, through_ops, rows, handle, topk_weights, bias, out, wire)

    def _with_weights(
        self,
        rows: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
        wire: str | None,
        back: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, summed = self._backend.combine(rows, handle, topk_weights, bias, out, wire, back, sums_back=True)
        return y, summed if handle.layout == "rank" else summed[:, 0].contiguous()

    def _by_operator(
        self,
        rows: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
        wire: str | None = None,
    ) -> torch.Tensor:
        name = ops.name_in_graph(self._backend)
        y: torch.Tensor = ops.combine(
            rows, topk_weights, bias, handle.tensor(), name, handle.layout, handle.num_tokens, wire
        )
        return y
