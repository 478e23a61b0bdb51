"""Grouped matrix products, as experts need them: consecutive groups of rows, with one matrix per group.

Uses torch.nn.functional.grouped_mm if torch supports these operands, else an operator that multiplies group by group.
Tracing depends on the group sizes in neither case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..tensors import plain


def grouped_mm(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """y[rows of group g] = x[rows of group g] @ w[g].

    Parameters
    ----------
    x : Tensor [N, K]
    w : Tensor [G, K, M]
    ends : Tensor [G] int64
        Row index after the last row of each group, ascending. Rows after the last group must be zero; their results
        are zero.

    Returns
    -------
    Tensor [N, M]
    """
    x, w, ends = (
        plain("grouped_mm", name, t, traceable=True) for name, t in (("x", x), ("w", w), ("ends", ends))
    )
    if _torch_supports(x, w):
        # The last group reaches to the last row, so that grouped_mm defines all rows.
        offsets = torch.cat([ends[:-1], ends.new_full((1,), x.shape[0])]).to(
            device=x.device, dtype=torch.int32
        )
        y: torch.Tensor = torch.nn.functional.grouped_mm(x, w, offs=offsets)
    else:
        y = torch.ops.moecomm.grouped_mm(x, w, ends)
    return y


def grouped_mm_into(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Write the same product to `out` [N, M]. Not differentiable. Rows after the last group are not written."""
    first = 0
    for g, end in enumerate(ends.tolist()):
        torch.mm(x[first:end], w[g], out=out[first:end])
        first = end
    return out


def _torch_supports(x: torch.Tensor, w: torch.Tensor) -> bool:
    if not hasattr(torch.nn.functional, "grouped_mm") or not all(
        n * x.element_size() % 16 == 0 for n in w.shape[1:]
    ):
        return False
    # torch traces grouped_mm in bfloat16 only.
    dtypes = (
        (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float16, torch.float32)
    )
    return x.dtype in dtypes


def _mm(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(x.shape[0], w.shape[2])
    grouped_mm_into(y, x, w, ends)
    return y


def _outer(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    w = x.new_zeros(len(ends), x.shape[1], y.shape[1])
    first = 0
    for g, end in enumerate(ends.tolist()):
        torch.mm(x[first:end].T, y[first:end], out=w[g])
        first = end
    return w


def _mm_backward(ctx: Any, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    x, w, ends = ctx.saved_tensors
    return (
        torch.ops.moecomm.grouped_mm(y, w.transpose(1, 2), ends),
        torch.ops.moecomm.grouped_outer(x, y, ends),
        None,
    )


def _outer_backward(ctx: Any, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    x, y, ends = ctx.saved_tensors
    return (
        torch.ops.moecomm.grouped_mm(y, w.transpose(1, 2), ends),
        torch.ops.moecomm.grouped_mm(x, w, ends),
        None,
    )


def _define(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], backward: Callable[..., Any]
) -> None:
    op = torch.library.custom_op(
        f"moecomm::{name}", run, mutates_args=(), schema="(Tensor x, Tensor w, Tensor ends) -> Tensor"
    )
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


_define("grouped_mm", _mm, lambda x, w, ends: x.new_empty(x.shape[0], w.shape[2]), _mm_backward)
# The gradient of w: x^T y over the rows of each group.
_define(
    "grouped_outer",
    _outer,
    lambda x, w, ends: x.new_empty(ends.shape[0], x.shape[1], w.shape[1]),
    _outer_backward,
)
