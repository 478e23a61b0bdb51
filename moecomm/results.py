"""Results of calls: Dispatched, its Handle, and Pending."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import time
from functools import cached_property

import torch

from ._cuda import cuda

from . import ops
from ._native import core
from .elastic.verdict import require_generation
from .shapes import require_count_dtype

if TYPE_CHECKING:
    from .backend import Backend
    from .first_phase import FirstPhase
    from .opaque import Opaque
    from .communicator import Communicator


class Dispatched:
    """Result of a dispatch. Its tensors are views of the window.

    Attributes
    ----------
    handle : Handle
        For combine, and for later dispatches with the same plan.
    lost_weight : Tensor float32 [T] or None
        With a placement: for each token of this rank, the weight of its picks whose experts have no replica any more.
        None if the plan was reused.
    """

    # Fields are ordinary attributes. A field that is not set is made from the block at its first use.
    lost_weight: torch.Tensor | None = None
    block: Any  # native memory of the fields

    def __init__(
        self, handle: Handle, lost_weight: torch.Tensor | None = None, tensors: BlockTensors | None = None
    ) -> None:
        self.handle, self.lost_weight = handle, lost_weight
        if tensors is not None:
            self._tensors, self.block = tensors, tensors.block

    @cached_property
    def _tensors(self) -> BlockTensors:
        memory = self.handle.owner.memory  # by default, rows have the dtype of the buffer and no scales
        return BlockTensors(self.handle, self.block, memory.dtype, memory.row_bytes, 0)

    @cached_property
    def x(self) -> torch.Tensor:
        """Received rows [N, hidden]."""
        x: torch.Tensor = self._tensors.make("x")
        return x

    @cached_property
    def scales(self) -> torch.Tensor | None:
        """Scales of quantized rows: float32 [N, hidden/128], or int32 [N, hidden/512] for UE8M0; otherwise None."""
        scales: torch.Tensor | None = self._tensors.make("scales")
        return scales

    @cached_property
    def topk_weights(self) -> torch.Tensor:
        """Weights float32: [N] in the expert layout, [N, top_k] in the rank layout. 0 without a pick of this rank."""
        weights: torch.Tensor = self._tensors.make("weights")
        return weights

    @cached_property
    def topk_ids(self) -> torch.Tensor | None:
        """Local expert ids int64 [N, top_k], -1 for picks of other ranks. None in the expert layout."""
        return None if self.handle.layout == "expert" else self._tensors.make("ids")

    @cached_property
    def source(self) -> torch.Tensor:
        """Source of each row, int64 [N]: rank << 32 | token. -1 on padding."""
        source: torch.Tensor = self._tensors.make("source")
        return source

    @cached_property
    def sides(self) -> tuple[torch.Tensor, ...]:
        """Side tensors [N] or [N, n] of opaque rows, in the order of Opaque(rows, *sides). () for other rows."""
        return self._tensors.sides()

    @property
    def source_rank(self) -> torch.Tensor:
        """Source rank of each row, int64 [N]. -1 on padding."""
        return self.source >> 32

    @property
    def source_token(self) -> torch.Tensor:
        """Index of each row's token at its source, int64 [N]. -1 on padding."""
        return torch.where(self.source < 0, self.source, self.source & 0xFFFFFFFF)

    def take(self, other: Dispatched) -> None:
        """Take over the rows and the handle of a repetition of this dispatch. The shapes are the same."""
        if self.block is not other.block:
            memoryview(self.block)[:] = memoryview(other.block)
            self.handle.take(other.handle)

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """Number of rows of each local expert without padding, int64 [experts per rank]."""
        return self.handle.counts()[0]

    @property
    def rows_per_source(self) -> torch.Tensor:
        """Number of rows from each source rank without padding, int64 [size]."""
        return self.handle.count_per_rank(self.source_rank)

    @property
    def rows_per_expert(self) -> torch.Tensor:
        """Number of rows of each local expert with padding, int64 [experts per rank]."""
        return self.handle.counts()[1]

    def counts_as(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (tokens_per_expert, rows_per_expert) with another dtype: int32 for kernels that want it, or int64.

        Raises
        ------
        InvalidArgument
            dtype is another one.
        """
        require_count_dtype(dtype)
        true, padded = self.handle.counts()
        return true.to(dtype), padded.to(dtype)


class Handle:
    """Identifies a dispatch, for combine and for later dispatches with the same plan.

    Attributes
    ----------
    num_rows : int
        Received rows, N.
    num_tokens : int
        Tokens of this rank.
    layout : "expert" or "rank"
    """

    # .owner is the Backend of the dispatch. An attribute that is None is made at its first use.
    owner: Backend
    capacity: int | None = None
    made_plan: Any = None
    made_output: Any = None
    _made_tensor: torch.Tensor | None = None
    _made_counts: Any = None
    memory: Any = None  # native memory of the dispatch; the buffer may have larger memory now

    def __init__(
        self,
        owner: Backend,
        layout: str,
        capacity: int | None,
        num_rows: int,
        num_tokens: int,
        *,
        native: Any = None,
        plan: Any = None,
        output: Any = None,
        tensor: torch.Tensor | None = None,
        counts: Any = None,
    ) -> None:
        self.owner, self.capacity, self.memory = owner, capacity, native
        self.layout, self.num_rows, self.num_tokens = layout, num_rows, num_tokens
        self.made_plan, self.made_output, self._made_tensor, self._made_counts = (
            plan,
            output,
            tensor,
            counts,
        )

    @property
    def plan(self) -> Any:
        """Plan for native calls."""
        if self.made_plan is None:  # made by an operator: the tensor refers to a ticket
            ticket = ops.ticket_of(self._made_tensor)  # type: ignore[arg-type]
            self.made_plan, self.made_output, self.memory = ticket.plan, ticket.output, ticket.native
        return self.made_plan

    @property
    def output(self) -> Any:
        """Memory of .rows for native calls."""
        return self.made_output if self.plan is not None else None

    def tensor(self) -> torch.Tensor:
        """Return the handle as a tensor for torch.ops.moecomm.*: int64 [1] on the host. Copies of it are not valid."""
        if self._made_tensor is None:
            self._made_tensor = ops.Ticket(
                self.owner, self.layout, self.capacity, self.plan, self.output, self.memory
            ).tensor()
        return self._made_tensor

    def count_per_rank(self, ranks: torch.Tensor) -> torch.Tensor:
        """Count how often each rank occurs in ranks int64 [N], without -1: int64 [size]. The host does not wait."""
        counts = ranks.new_zeros(self.owner.memory.comm.size + 1)
        return counts.index_add_(0, ranks + 1, torch.ones_like(ranks))[1:]

    def take(self, other: Handle) -> None:
        """Become the handle of a repetition of the dispatch."""
        self.made_plan, self.made_output, self.memory = other.plan, other.output, other.memory
        self._made_tensor = None
        self.__dict__.pop("rows", None)

    @property
    def has_counts(self) -> bool:
        """Whether the tensors of counts() exist already."""
        return self._made_counts is not None

    def counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of each local expert: (without padding, with padding)."""
        if self._made_counts is None:
            plan, n = self.plan, self.owner.memory.experts_per_rank
            if isinstance(plan, core.Plan):
                self._made_counts = plan.counts(n)
            if self._made_counts is None:
                self._made_counts = _counts(plan.tokens_per_expert(n)), _counts(plan.rows_per_expert(n))
        counts: tuple[torch.Tensor, torch.Tensor] = self._made_counts
        return counts

    @cached_property
    def rows(self) -> torch.Tensor:
        """Window memory for the experts' output, [N, hidden] of the buffer's dtype. combine reads it in place."""
        memory = self.owner.memory
        return view(self.output, 0, memory.dtype, (self.num_rows, memory.hidden), memory.comm.device)


def dispatched_of(owner: Backend, native: Any, layout: str, made: Any) -> Dispatched:
    """Make the result of dispatch from that of a native try_dispatch."""
    plan, block, output, rows, x, weights = made
    out = Dispatched(Handle(owner, layout, None, rows, plan.tokens, native=native, plan=plan, output=output))
    out.block = block
    if x is not None:
        out.x = x
    if weights is not None:
        out.topk_weights = weights
    return out


def parts_in(handle: Handle, native: Any) -> tuple[Any, Any] | None:
    """Return (plan, output) of a handle if they are made already and belong to this native memory, else None."""
    if handle.made_plan is None or handle.memory is not native:
        return None
    return handle.made_plan, handle.made_output


Result = TypeVar("Result")


class Pending(Generic[Result]):
    """An asynchronous call on the progress thread. Keeps the inputs alive until the call is done.

    Attributes
    ----------
    span : (float, float) or None
        Begin and end of the call in seconds of time.perf_counter(), once it is done.
    """

    event = None  # set in the CUDA world

    def __init__(
        self,
        comm: Communicator,
        work: Callable[[], Result],
        keep: Any,
        then: Callable[[Result], Any] | None = None,
    ) -> None:
        self._comm, self.span, self._keep, self._then = comm, None, keep, then
        self._made_with = comm.native

        def timed() -> Result:
            begin = time.perf_counter()
            result = work()
            self.span = begin, time.perf_counter()
            return result

        self._future: Future[Result] = comm.order.submit(timed)

    def wait(self) -> Result:
        """Wait for the call and return its result.

        Raises
        ------
        InvalidArgument
            The call is not done and would never be: this process is a forked child, or this code runs inside another
            call of the communicator.
        MoecommError
            The error of the call.
        """
        result = self._result("wait")
        then, self._keep, self._then = self._then, None, None
        if then is not None:
            then(result)
        return result

    def done(self) -> bool:
        """Whether wait() would return immediately."""
        return self._future.done()

    def _require_ends(self, op: str) -> None:
        """Refuse to wait for a call that would never be done."""
        require_generation(self._comm, op, "the call", self._made_with)
        if not self._future.done():
            self._comm.order.require_outside(op)

    def _result(self, op: str) -> Result:
        self._require_ends(op)
        return self._future.result()


class PendingDispatch(Pending["Dispatched"]):
    """An asynchronous dispatch on the progress thread. Its counts can be known before its rows have arrived."""

    def __init__(
        self,
        comm: Communicator,
        work: Callable[[], Dispatched],
        keep: Any,
        then: Callable[[Dispatched], Any] | None,
        first: FirstPhase,
    ) -> None:
        self._first = first
        super().__init__(comm, work, keep, then)

    def wait_counts(self) -> Dispatched:
        """Wait until the number of rows is known, and return the result with its counts and shapes.

        The ranks exchange counts before rows. So .tokens_per_expert, .rows_per_expert and .handle.num_rows are known
        earlier than the rows, and .x and the other tensors have their shapes and addresses. Do not read or write
        their contents before wait(). If no gradient is needed, this is the object that wait() returns. Callable from
        any thread, several times, also after wait().

        On a GPU the host has waited for the counts already, so this returns at once. With a capacity it does not wait
        for them: then the current stream waits for the whole call.

        Raises
        ------
        InvalidArgument
            As wait.
        MoecommError
            The error of the call, if it has failed. If it fails later, only wait() raises the error.
        """
        op = "wait_counts"
        self._require_ends(op)
        early = self._first.wait()
        if early is None or self._future.done():
            whole = self._result(op)  # or its error
            return whole if early is None else early
        return early


class BlockTensors:
    """Makes the fields of a dispatch as views of its block."""

    def __init__(
        self,
        handle: Handle,
        block: Any,
        dtype: torch.dtype,
        row_bytes: int,
        scale_bytes: int,
        scale_dtype: Any = torch.float32,
        scales_by_column: bool = False,
        opaque: Opaque | None = None,
    ) -> None:
        self._handle, self.block, self._dtype = handle, block, dtype
        self._row_bytes, self._scale_bytes = row_bytes, scale_bytes
        self._scale_dtype, self._by_column, self._opaque = scale_dtype, scales_by_column, opaque
        self._offsets: Any = None

    def make(self, name: str) -> Any:
        """Make one of x, scales, weights, ids, source."""
        h = self._handle
        memory = h.owner.memory
        top_k, device = () if h.layout == "expert" else (memory.top_k,), memory.comm.device
        if name == "scales" and (self._opaque is not None or not self._scale_bytes):
            return None
        index, dtype, columns = {
            "x": (0, self._dtype, (memory.hidden,)),
            "scales": (1, self._scale_dtype, (self._scale_bytes // 4,)),
            "weights": (2, torch.float32, top_k),
            "ids": (3, torch.int64, top_k),
            "source": (4, torch.int64, ()),
        }[name]
        if self._offsets is None:
            self._offsets = h.memory.block_layout(
                h.plan, h.num_rows, self._row_bytes, self._scale_bytes, self._by_column
            )
        if name == "scales" and self._by_column:
            column = -(-h.num_rows // 4) * 4  # columns start on 16 bytes
            return view(self.block, self._offsets[index], dtype, (*columns, column), device).t()[: h.num_rows]
        if name == "x" and self._opaque is not None:
            return self._opaque.unpack_rows(self._bytes(index, self._row_bytes, device))
        return view(self.block, self._offsets[index], dtype, (h.num_rows, *columns), device)

    def sides(self) -> tuple[torch.Tensor, ...]:
        """Side tensors of opaque rows; () for other rows."""
        if self._opaque is None:
            return ()
        device = self.make("source").device
        return self._opaque.unpack_sides(self._bytes(1, self._scale_bytes, device))

    def _bytes(self, index: int, columns: int, device: torch.device) -> torch.Tensor:
        """Bytes of the block as uint8 [N, columns]."""
        return view(self.block, self._offsets[index], torch.uint8, (self._handle.num_rows, columns), device)


_DLPACK: dict[torch.dtype, tuple[int, int]] = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.int64: (0, 64),
}  # code, bits


def view(block: Any, offset: int, dtype: torch.dtype, shape: Any, device: torch.device) -> torch.Tensor:
    """Make a tensor of one or two dimensions at an offset of a block. The tensor keeps the block alive."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    if hasattr(block, "__cuda_array_interface__"):
        on_gpu: torch.Tensor = cuda.tensor_of(block, offset, dtype, shape)
        return on_gpu
    rows, columns = shape if len(shape) == 2 else (*shape, 0)
    made: torch.Tensor | None = None
    if dtype in _DLPACK:
        made = block.tensor(offset, *_DLPACK[dtype], rows, columns)
    if made is None:
        made = torch.frombuffer(block, dtype=dtype, count=rows * max(columns, 1), offset=offset).view(shape)
    return made


def _counts(counts: Any) -> Any:
    """Counts of a plan as a tensor, on the device of the buffer."""
    return (
        cuda.counts_of(counts)
        if hasattr(counts, "__cuda_array_interface__")
        else torch.tensor(counts, dtype=torch.int64, device="cpu")
    )
