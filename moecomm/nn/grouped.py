"""Matrix products of consecutive groups of rows with one matrix per group: what experts compute.

torch.nn.functional.grouped_mm where torch has it for these operands; else an operator that multiplies group
by group. Both trace without looking at the group sizes.
"""

from __future__ import annotations

import torch

from ..tensors import plain


def grouped_mm(x, w, ends):
    """y[rows of group g] = x[rows of group g] @ w[g].

    Parameters
    ----------
    x : Tensor [N, K]
    w : Tensor [G, K, M]
    ends : Tensor [G] int64
        Where each group ends, ascending; rows after the last end must be zero and stay zero.

    Returns
    -------
    Tensor [N, M]
    """
    x, w, ends = (
        plain("grouped_mm", name, t, traceable=True) for name, t in (("x", x), ("w", w), ("ends", ends))
    )
    if _torch_has_it(x, w):
        # To the last row, so that all rows are defined.
        offsets = torch.cat([ends[:-1], ends.new_full((1,), x.shape[0])]).to(
            device=x.device, dtype=torch.int32
        )
        return torch.nn.functional.grouped_mm(x, w, offs=offsets)
    return torch.ops.moecomm.grouped_mm(x, w, ends)


def grouped_mm_into(out, x, w, ends):
    """The same product written to `out` [N, M]; not differentiable. Rows after the last end are not written."""
    first = 0
    for g, end in enumerate(ends.tolist()):
        torch.mm(x[first:end], w[g], out=out[first:end])
        first = end
    return out


def _torch_has_it(x, w):
    if not hasattr(torch.nn.functional, "grouped_mm") or not all(
        n * x.element_size() % 16 == 0 for n in w.shape[1:]
    ):
        return False
    kinds = (
        (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float16, torch.float32)
    )  # what torch can trace
    return x.dtype in kinds


def _mm(x, w, ends):
    y = x.new_zeros(x.shape[0], w.shape[2])
    grouped_mm_into(y, x, w, ends)
    return y


def _outer(x, y, ends):
    w = x.new_zeros(len(ends), x.shape[1], y.shape[1])
    first = 0
    for g, end in enumerate(ends.tolist()):
        torch.mm(x[first:end].T, y[first:end], out=w[g])
        first = end
    return w


def _mm_backward(ctx, y):
    x, w, ends = ctx.saved_tensors
    return (
        torch.ops.moecomm.grouped_mm(y, w.transpose(1, 2), ends),
        torch.ops.moecomm.grouped_outer(x, y, ends),
        None,
    )


def _outer_backward(ctx, w):
    x, y, ends = ctx.saved_tensors
    return (
        torch.ops.moecomm.grouped_mm(y, w.transpose(1, 2), ends),
        torch.ops.moecomm.grouped_mm(x, w, ends),
        None,
    )


def _define(name, run, fake, backward):
    op = torch.library.custom_op(
        f"moecomm::{name}", run, mutates_args=(), schema="(Tensor x, Tensor w, Tensor ends) -> Tensor"
    )
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


_define("grouped_mm", _mm, lambda x, w, ends: x.new_empty(x.shape[0], w.shape[2]), _mm_backward)
# The adjoint in w: the product of x's and y's rows of each group.
_define(
    "grouped_outer",
    _outer,
    lambda x, w, ends: x.new_empty(ends.shape[0], x.shape[1], w.shape[1]),
    _outer_backward,
)
