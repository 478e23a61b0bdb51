"""What dispatch and combine return: Dispatched, its Handle, and Pending."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import time
from functools import cached_property

import torch

from ._cuda import cuda

from . import ops
from ._native import core

if TYPE_CHECKING:
    from .buffer import Buffer
    from .communicator import Communicator


class Dispatched:
    """What dispatch returns; its tensors are views of the window.

    .x [N, hidden], .scales [N, hidden/128] (int32 [N, hidden/512] for UE8M0) or None, .tokens_per_expert and .rows_per_expert int64
    [experts per rank] (true and padded counts), .topk_weights [N] (expert layout) or [N, top_k],
    .topk_ids int64 [N, top_k] local ids, -1 for picks of other ranks (rank layout, else None),
    .source_rank, .source_token [N] (-1 on padding), .handle. With a placement, .lost_weight [T] float32: of this rank's
    tokens, the weight of picks whose experts have no replica any more (of a plan that is used again: None).
    """

    # Fields are ordinary attributes; those that nobody has set are made of the block when they are first asked for.
    lost_weight: torch.Tensor | None = None
    _block: Any

    def __init__(self, handle: Handle, lost_weight: torch.Tensor | None = None) -> None:
        self.handle, self.lost_weight = handle, lost_weight

    @cached_property
    def _tensors(self) -> BlockTensors:
        b = self.handle._buffer
        return BlockTensors(
            self.handle, self._block, b.dtype, b._row_bytes, 0
        )  # rows of the buffer's dtype, as they left

    @cached_property
    def x(self) -> torch.Tensor:
        """Rows [N, hidden]."""
        return self._tensors.make("x")

    @cached_property
    def scales(self) -> torch.Tensor | None:
        """Scales of quantized rows, else None: float32 [N, hidden/128], or int32 [N, hidden/512] (UE8M0), in either layout."""
        return self._tensors.make("scales")

    @cached_property
    def topk_weights(self) -> torch.Tensor:
        """[N] in the expert layout, [N, top_k] in the rank layout, float32; 0 where there is no pick."""
        return self._tensors.make("weights")

    @cached_property
    def topk_ids(self) -> torch.Tensor | None:
        """Local expert ids [N, top_k] int64, -1 elsewhere (rank layout; None in the expert layout)."""
        return None if self.handle.layout == "expert" else self._tensors.make("ids")

    @cached_property
    def _source(self) -> torch.Tensor:
        return self._tensors.make("source")

    @property
    def source_rank(self) -> torch.Tensor:
        """Rank that each row comes from, int64 [N]; -1 on padding."""
        return self._source >> 32

    @property
    def source_token(self) -> torch.Tensor:
        """Token at that rank, int64 [N]; -1 on padding."""
        return torch.where(self._source < 0, self._source, self._source & 0xFFFFFFFF)

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """True number of rows of every local expert, int64 [experts per rank]."""
        return self.handle._counts()[0]

    @property
    def rows_per_expert(self) -> torch.Tensor:
        """Rows of every local expert with padding, int64 [experts per rank]."""
        return self.handle._counts()[1]


class Handle:
    """What combine needs to undo a dispatch, and a dispatch needs to repeat one.

    .rows [N, hidden]: a place in the window of the buffer's dtype for the experts' output; written
    there and passed to combine, it is read in place. .num_rows, .num_tokens, .layout.
    """

    # What is None is made when it is first asked for.
    _capacity: int | None = None
    _made_plan: Any = None
    _made_output: Any = None
    _made_tensor: torch.Tensor | None = None
    _made_counts: Any = None

    def __init__(
        self,
        buffer: Buffer,
        layout: str,
        capacity: int | None,
        num_rows: int,
        num_tokens: int,
        *,
        plan: Any = None,
        output: Any = None,
        tensor: torch.Tensor | None = None,
        counts: Any = None,
    ) -> None:
        self._buffer, self._capacity = buffer, capacity
        self.layout, self.num_rows, self.num_tokens = layout, num_rows, num_tokens
        self._made_plan, self._made_output, self._made_tensor, self._made_counts = (
            plan,
            output,
            tensor,
            counts,
        )

    @property
    def _plan(self) -> Any:
        if self._made_plan is None:  # an operator's handle: its tensor stands for a ticket
            ticket = ops.ticket_of(self._made_tensor)  # type: ignore[arg-type]
            self._made_plan, self._made_output = ticket.plan, ticket.output
        return self._made_plan

    @property
    def _output(self) -> Any:
        return self._made_output if self._plan is not None else None

    def tensor(self) -> torch.Tensor:
        """The handle as torch.ops.moecomm.* take it: int64 [1] on the host. Keep this tensor, not a copy of it."""
        if self._made_tensor is None:
            self._made_tensor = ops.Ticket(
                self._buffer, self.layout, self._capacity, self._plan, self._output
            ).tensor()
        return self._made_tensor

    def _counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(true, padded) rows of every local expert."""
        if self._made_counts is None:
            plan, n = self._plan, self._buffer.experts_per_rank
            if isinstance(plan, core.Plan):
                self._made_counts = core.counts_of(plan, n)
            if self._made_counts is None:
                self._made_counts = _counts(plan.tokens_per_expert(n)), _counts(plan.rows_per_expert(n))
        return self._made_counts

    @cached_property
    def rows(self) -> torch.Tensor:
        """The experts' output, to be written: [N, hidden] in the window."""
        return view(
            self._output,
            0,
            self._buffer.dtype,
            (self.num_rows, self._buffer.hidden),
            self._buffer.comm.device,
        )


core.return_as(Dispatched, Handle)


class Pending:
    """A call that runs on the progress thread; keeps its inputs alive until it is done.

    .span: (begin, end) of the call there, in seconds of time.perf_counter(), once it is done.
    """

    event = None  # set in the CUDA world

    def __init__(
        self, comm: Communicator, work: Callable[[], Any], keep: Any, then: Callable[[Any], Any] | None = None
    ) -> None:
        self._comm, self.span, self._keep, self._then = comm, None, keep, then

        def timed() -> Any:
            begin = time.perf_counter()
            result = work()
            self.span = begin, time.perf_counter()
            return result

        self._future = comm._submit(timed)

    def wait(self) -> Any:
        """The call's result, when it is there.

        Raises
        ------
        InvalidArgument
            It is not there, and waiting would not bring it: this is a forked child, or code that runs inside another call of the communicator.
        MoecommError
            What the call raised.
        """
        if not self._future.done():
            self._comm._require_outside("wait")
        result = self._future.result()
        then, self._keep, self._then = self._then, None, None
        if then is not None:
            then(result)
        return result

    def done(self) -> bool:
        """Whether wait() would return at once."""
        return self._future.done()


class BlockTensors:
    """Makes the fields of a dispatch as views of its block."""

    def __init__(
        self,
        handle: Handle,
        block: Any,
        dtype: torch.dtype,
        row_bytes: int,
        scale_bytes: int,
        scale_dtype: torch.dtype = torch.float32,
        scales_by_column: bool = False,
    ) -> None:
        self._handle, self._block, self._dtype = handle, block, dtype
        self._row_bytes, self._scale_bytes = row_bytes, scale_bytes
        self._scale_dtype, self._by_column = scale_dtype, scales_by_column
        self._offsets: Any = None

    def make(self, name: str) -> Any:
        """One of x, scales, weights, ids, source."""
        h = self._handle
        buffer, top_k = h._buffer, () if h.layout == "expert" else (h._buffer.top_k,)
        if name == "scales" and not self._scale_bytes:
            return None
        index, dtype, columns = {
            "x": (0, self._dtype, (buffer.hidden,)),
            "scales": (1, self._scale_dtype, (self._scale_bytes // 4,)),
            "weights": (2, torch.float32, top_k),
            "ids": (3, torch.int64, top_k),
            "source": (4, torch.int64, ()),
        }[name]
        if self._offsets is None:
            self._offsets = buffer._native.block_layout(
                h._plan, h.num_rows, self._row_bytes, self._scale_bytes, self._by_column
            )
        if name == "scales" and self._by_column:
            column = -(-h.num_rows // 4) * 4  # columns start on 16 bytes
            return view(self._block, self._offsets[index], dtype, (*columns, column), buffer.comm.device).t()[
                : h.num_rows
            ]
        return view(self._block, self._offsets[index], dtype, (h.num_rows, *columns), buffer.comm.device)


_DLPACK: dict[torch.dtype, tuple[int, int]] = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.int64: (0, 64),
}  # code, bits


def view(block: Any, offset: int, dtype: torch.dtype, shape: Any, device: torch.device) -> torch.Tensor:
    """A tensor of one or two dimensions at an offset of a block, which lives as long as the tensor."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    if hasattr(block, "__cuda_array_interface__"):
        return cuda.tensor_of(block, offset, dtype, shape)
    rows, columns = shape if len(shape) == 2 else (*shape, 0)
    made: Any = core.tensor_at(block, offset, *_DLPACK[dtype], rows, columns) if dtype in _DLPACK else None
    if made is None:
        made = torch.frombuffer(block, dtype=dtype, count=rows * max(columns, 1), offset=offset).view(shape)
    return made


def _counts(counts: Any) -> Any:
    """A tensor of a plan's counts, where the buffer's tensors are."""
    return (
        cuda.counts_of(counts)
        if hasattr(counts, "__cuda_array_interface__")
        else torch.tensor(counts, dtype=torch.int64, device="cpu")
    )
