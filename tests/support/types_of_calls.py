"""What type checkers know of a call's result. mypy reads this file in `make lint`; nothing runs it."""

import torch
from typing_extensions import assert_type

from moecomm import Buffer, Communicator, Dispatched, Pending, PendingDispatch


def dispatches(comm: Communicator, x: torch.Tensor, ids: torch.Tensor, later: bool) -> None:
    """A Dispatched, or with async_op a Pending of one."""
    buf = Buffer(comm, hidden=64, num_experts=4, top_k=2, max_tokens=8)
    assert_type(buf.dispatch(x, ids), Dispatched)
    assert_type(buf.dispatch(x, ids, quant="fp8", capacity=4), Dispatched)
    assert_type(buf.dispatch(x, ids, async_op=True), PendingDispatch)
    assert_type(buf.dispatch(x, ids, async_op=True).wait().x, torch.Tensor)
    assert_type(buf.dispatch(x, ids, async_op=True).wait_counts(), Dispatched)
    assert_type(buf.dispatch(x, ids, async_op=later), Dispatched | PendingDispatch)


def combines(buf: Buffer, out: Dispatched, weights: torch.Tensor) -> None:
    """A tensor; with return_weights two of them; with async_op a Pending."""
    rows, handle = out.x, out.handle
    assert_type(buf.combine(rows, handle, wire="fp8"), torch.Tensor)
    both = buf.combine(rows, handle, topk_weights=weights, return_weights=True)
    assert_type(both, tuple[torch.Tensor, torch.Tensor])
    assert_type(buf.combine(rows, handle, async_op=True), Pending[torch.Tensor])
    later = buf.combine(rows, handle, topk_weights=weights, return_weights=True, async_op=True)
    assert_type(later, Pending[tuple[torch.Tensor, torch.Tensor]])
