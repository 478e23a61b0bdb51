"""Buffer: the windows of one layer shape, and the two verbs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch.utils.hooks import RemovableHandle

from . import shapes
from .backend import Backend
from .building import agreed_arguments, make_backend, open_memory
from .calls import Calls
from .combining import CombinePath
from .decode import DecodeHandle, DecodePath, DecodeReceived, Hook
from .dispatching import DispatchPath
from .elastic.masking import mask
from .elastic.renewed import Origin, enroll
from .errors import InvalidArgument
from .results import Dispatched, Handle, Pending, PendingDispatch
from .shapes import Shape, as_int
from .shared import Shared

if TYPE_CHECKING:
    import os

    from typing_extensions import Unpack

    from .balance import LoadMonitor, Placement
    from .communicator import Communicator
    from .opaque import Opaque

    Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | Opaque


class DispatchOptions(TypedDict, total=False):
    """Keywords of Buffer.dispatch that do not change the type of its result."""

    layout: str
    expert_alignment: int
    quant: str | None
    scale_layout: str
    handle: Handle | None
    capacity: int | None
    check: bool
    layer: int
    num_experts: int | None


class CombineOptions(TypedDict, total=False):
    """Keywords of Buffer.combine that do not change the type of its result."""

    topk_weights: torch.Tensor | None
    bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
    wire: str | None
    check: bool
    out: torch.Tensor | None


class Buffer(Shared):  # defines copies and pickles, and uses nothing of Buffer
    """Memory and state for dispatch and combine of one layer shape. Construction is collective.

    hidden, num_experts, top_k, max_tokens and dtype may be omitted; then the first call of all ranks sets them. Without
    max_tokens, the memory has space for the largest call of any rank, and grows if a later call is larger: within that
    call, all ranks make larger memory and repeat the call. Buffers of a communicator with equal shapes share such
    memory. A handle is valid for every buffer of the same communicator and shape.

    Parameters
    ----------
    comm : Communicator
    hidden : int, optional
        Elements of a row; a row must be a multiple of 16 bytes.
    num_experts : int, optional
        Over all ranks; divisible by comm.size. Expert e is on rank e // (num_experts / size). If it is omitted, the
        first dispatch needs it.
    top_k : int, optional
        Picks per token, 1..32.
    max_tokens : int, optional
        Maximum number of tokens of a rank in one call.
    dtype : torch.dtype, optional
        Dtype of rows in combine, and in dispatch unless they are quantized: bfloat16, float16, float32, float64. None:
        bfloat16 if hidden is given, else that of the rows of the first call.
    num_sms : int
        Multiprocessors for the CUDA world; the cpu world ignores it.
    channels : int, optional
        Independent slices of the tokens, each with its own pipeline.
    decode : bool
        Make the memory of the decode path now. False: the first decode_dispatch makes it (collectively).
    decode_max_tokens : int, optional
        Maximum number of tokens of a decode call, at most max_tokens. None: max_tokens; without max_tokens, the tokens
        of the first decode call, rounded up to a power of two. Use a small number on a GPU, which commits all of this
        memory.
    arena_bytes : int, optional
        Window memory for dispatch outputs and experts' outputs. None: twice the worst case of one dispatch (all tokens
        of all ranks to one rank); reserved, and committed when first touched. With None it also grows on CPUs if
        results are kept for longer, unless the buffer records or has a placement.
    record : path-like, optional
        Folder for a recording of routing, times and traffic of every dispatch and combine (moecomm.record). On a GPU,
        replays of CUDA graphs are not recorded.
    placement : moecomm.balance.Placement, optional
        With a placement, topk_ids are logical experts, and num_experts is their number. Each batch chooses the replica
        of every pick. The rest of the buffer uses slots: rank r's local experts are the slots of the placement. The
        host makes the choice: on a GPU, every dispatch with topk_ids waits for them, and cannot be captured in a CUDA
        graph (a dispatch with `handle` can).
    replicas : "local", "even" or "optimal"
        Choice of replicas (docs/balance.md): fewest nodes, even split, or smallest maximum load of a rank.
    activate : int, optional
        Maximum number of slots of a rank that are active in one batch. Needs a placement.
    renormalize : bool
        If an expert has no replica left because ranks were lost, scale up the weights of the token's other picks.
    monitor : moecomm.balance.LoadMonitor, optional
        Receives the counts of every batch. Needs a placement.

    Raises
    ------
    InvalidArgument
        An argument or a MOECOMM_* variable is invalid on some rank. Raised on all ranks; the message names it.
    ConfigMismatch
        Ranks differ in an argument or MOECOMM_CHECK. Raised on all ranks.

    Source: DeepSeek-V3 technical report, section 3.2.2 (dispatch and combine over two networks).
    """

    # The public methods and their documentation are here. The parts do the work, and do not use the Buffer.
    # The rest of the library uses only .backend.
    comm: Communicator
    origin: Origin
    backend: Backend

    def __init__(
        self,
        comm: Communicator,
        *,
        hidden: int | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
        num_sms: int = 20,
        channels: int | None = None,
        arena_bytes: int | None = None,
        decode: bool = False,
        record: str | os.PathLike[str] | None = None,
        placement: Placement | None = None,
        replicas: str = "optimal",
        activate: int | None = None,
        renormalize: bool = False,
        monitor: LoadMonitor | None = None,
        decode_max_tokens: int | None = None,
    ) -> None:
        self.origin = Origin({k: v for k, v in locals().items() if k not in ("self", "comm")})
        given = Shape(hidden, num_experts, top_k, max_tokens, dtype, channels, arena_bytes)
        agreed = agreed_arguments(
            comm,
            given,
            num_sms,
            decode,
            record,
            placement,
            replicas,
            activate,
            renormalize,
            monitor,
            decode_max_tokens,
        )
        router: Any = None  # with a router, experts are slots from here on
        if placement is not None:
            router = placement.router_type(comm, placement, replicas, activate, renormalize, monitor)
        self.comm = comm
        self.backend = backend = make_backend(comm, given, agreed, as_int(num_sms), router)
        calls = Calls(backend)
        self._dispatching = DispatchPath(backend, calls)
        self._combining = CombinePath(backend, calls)
        self._decoding = DecodePath(backend)
        enroll(self)
        if agreed.shape.is_known:
            open_memory(backend, agreed.shape, record, decode, type(self), self.origin.kwargs)

    # -- the two verbs ----------------------------------------------------------------------------

    @overload
    def dispatch(
        self,
        x: Rows,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        async_op: Literal[False] = False,
        **options: Unpack[DispatchOptions],
    ) -> Dispatched: ...

    @overload
    def dispatch(
        self,
        x: Rows,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        async_op: Literal[True],
        **options: Unpack[DispatchOptions],
    ) -> PendingDispatch: ...

    @overload
    def dispatch(
        self,
        x: Rows,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        async_op: bool,
        **options: Unpack[DispatchOptions],
    ) -> Dispatched | PendingDispatch: ...

    def dispatch(
        self,
        x: Rows,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        layout: str = "expert",
        expert_alignment: int = 1,
        quant: str | None = None,
        scale_layout: str = "row",
        handle: Handle | None = None,
        capacity: int | None = None,
        async_op: bool = False,
        check: bool = False,
        layer: int = 0,
        num_experts: int | None = None,
    ) -> Any:
        """Send every token to the ranks of its experts. Collective.

        Parameters
        ----------
        x : Tensor [T, hidden], or (fp8 Tensor [T, hidden], scales [T, hidden/128] f32 or [T, hidden/512] int32)
            T may differ between ranks and be 0. int32 scales are UE8M0, packed as by moecomm.quant. Or Opaque(rows,
            *sides): rows of any dtype and side tensors, which are sent unchanged. Between nodes, and on a GPU, such a
            token has at most the bytes of a row of the buffer.
        topk_ids : Tensor [T, top_k] int64 or int32
            Global expert ids, distinct in a token; -1: no expert. Omitted with `handle`.
        topk_weights : Tensor [T, top_k] float32, optional
            Sent with the rows.
        layout : "expert" or "rank"
            One row per (token, expert), grouped by expert; or one row per (token, destination rank).
        expert_alignment : int
            The rows of each expert are padded with zero rows to a multiple of this (expert layout).
        quant : None, "fp8" or "fp8_ue8m0"
            Quantize rows of the buffer's dtype like moecomm.quant.quantize, with f32 or power-of-two scales. Each row
            is read and quantized once, when it is sent.
        scale_layout : "row" or "column"
            Layout of received scales: strides (scales, 1), or (1, N rounded up to a multiple of 4).
        handle : Handle, optional
            Reuse the plan of an earlier dispatch, without an exchange of counts. The dispatch may be of another buffer
            with the same communicator and shape.
        capacity : int, optional
            Static number of rows of the result. Rows after the received ones are zero.
        async_op : bool
            Run on the communicator's progress thread; return a PendingDispatch, whose counts come before its rows.
        check : bool
            Also refuse NaN in topk_weights.
        layer : int
            Of the placement, where the buffer has one.
        num_experts : int, optional
            Needed in the first call of a buffer that was made without it.

        Returns
        -------
        Dispatched
            .x [N, hidden], .scales, .sides, .tokens_per_expert int64 [experts per rank], .rows_per_expert,
            .topk_weights, .topk_ids, .handle. The tensors are views of the window, without a copy. The memory is freed
            with the last of them. Row order: (local expert, source rank, source token), or (source rank, source token)
            in the rank layout.

        Raises
        ------
        InvalidArgument
            No data has moved and the buffer stays usable. Raised on all ranks: .peer names the refusing rank if it is
            another one.
        CapacityExceeded, ConfigMismatch
            Raised on all ranks; the buffer stays usable. If ranks make different calls, the communicator breaks.
            CapacityExceeded: the rows exceed `capacity`, or an arena with a given `arena_bytes` (or any arena of a
            GPU); other arenas grow.
        PeerLost, PeerTimeout
            A peer has ended or does not respond; the communicator is broken.

        Source: DeepSeek-V3 technical report, section 3.2.2.
        """
        return self._dispatching.dispatch(
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

    @overload
    def combine(
        self,
        rows: torch.Tensor,
        handle: Handle,
        *,
        async_op: Literal[False] = False,
        return_weights: Literal[False] = False,
        **options: Unpack[CombineOptions],
    ) -> torch.Tensor: ...

    @overload
    def combine(
        self,
        rows: torch.Tensor,
        handle: Handle,
        *,
        async_op: Literal[False] = False,
        return_weights: Literal[True],
        **options: Unpack[CombineOptions],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    @overload
    def combine(
        self,
        rows: torch.Tensor,
        handle: Handle,
        *,
        async_op: Literal[True],
        return_weights: Literal[False] = False,
        **options: Unpack[CombineOptions],
    ) -> Pending[torch.Tensor]: ...

    @overload
    def combine(
        self,
        rows: torch.Tensor,
        handle: Handle,
        *,
        async_op: Literal[True],
        return_weights: Literal[True],
        **options: Unpack[CombineOptions],
    ) -> Pending[tuple[torch.Tensor, torch.Tensor]]: ...

    @overload
    def combine(
        self,
        rows: torch.Tensor,
        handle: Handle,
        *,
        async_op: bool = False,
        return_weights: bool = False,
        **options: Unpack[CombineOptions],
    ) -> Any: ...

    def combine(
        self,
        rows: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        wire: str | None = None,
        return_weights: bool = False,
        async_op: bool = False,
        check: bool = False,
        out: torch.Tensor | None = None,
    ) -> Any:
        """Send the experts' rows back to the ranks of their tokens and sum them. Collective.

        Parameters
        ----------
        rows : Tensor [N, hidden] of the buffer's dtype
            handle.rows (read in place), or any other tensor (copied once).
        handle : Handle
            Handle of the dispatch. The dispatch may be of another buffer with the same communicator and shape.
        topk_weights : Tensor [N] float32, optional
            Expert layout: y[t] = sum of topk_weights[row] * rows[row] over the token's rows; None: ones. Rank layout:
            [N, top_k], only with return_weights, because the experts have already applied the weights to the rows.
        bias : Tensor [hidden] or [T, hidden] float32, or a pair of such, optional
            Added in FP32 before the one rounding.
        wire : None, "fp8" or "logfmt10"
            Format of sums from other nodes: rounded to dtype, or FP32 values encoded like moecomm.quant.encode_wire.
            It does not affect rows of this rank's node. Ranks may choose differently.
        return_weights : bool
            Also return topk_weights, summed in FP32 over all rows of each token (ones give the number of its rows).
            The same on all ranks; no gradients.
        async_op, check : bool
            As for dispatch.
        out : Tensor [T, hidden], optional
            Tensor for the result. It must not overlap rows, weights, bias or a window of this buffer. None: a new
            tensor.

        Returns
        -------
        Tensor [T, hidden]; with return_weights (that, Tensor [T] float32, in the rank layout [T, top_k])
            Summed in FP32 (FP64 for float64), by ascending node, rank and expert. The sum of another node is rounded
            once, to `wire`, and added in FP32. Results are bit-identical from run to run.

        Raises
        ------
        InvalidArgument, PeerLost, PeerTimeout
            As dispatch.

        Source: DeepSeek-V3 technical report, section 3.2.2.
        """
        return self._combining.combine(
            rows, handle, topk_weights, bias, wire, return_weights, async_op, check, out
        )

    # -- the decode path --------------------------------------------------------------------------

    def decode_dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_ids: torch.Tensor,
        *,
        topk_weights: torch.Tensor | None = None,
        quant: str | None = "fp8",
        scale_layout: str = "row",
        return_hook: bool = True,
        layer: int = 0,
        num_experts: int | None = None,
    ) -> tuple[DecodeReceived, Hook | None]:
        """Send every token to the ranks of its experts, with minimum latency. Collective.

        Parameters
        ----------
        x : Tensor [T, hidden], or (fp8 Tensor [T, hidden], scales), as for dispatch
            T may differ between ranks and be 0.
        topk_ids : Tensor [T, top_k] int64 or int32
            Global expert ids, distinct in a token; -1: no expert.
        topk_weights : Tensor [T, top_k] float32, optional
            The weights are sent, and decode_combine returns one weighted row per token and rank instead of one per
            expert.
        quant : "fp8", "fp8_ue8m0" or None
            Quantize rows when they are sent, with f32 or power-of-two scales. None keeps the dtype of x. Ignored if x
            is already quantized.
        scale_layout : "row" or "column"
            Layout of recv.scales: strides (hidden/128, 1) within an expert, or (1, rows rounded up to a multiple of 4).
        return_hook : bool
            True: only send; the hook waits for the others' messages, and nothing runs between the two. False: do both.
        layer : int
            Of the placement, where the buffer has one.
        num_experts : int, optional
            Needed in the first call of a buffer that was made without it.

        Returns
        -------
        (DecodeReceived, hook)
            Valid after hook(); hook is None with return_hook=False. The dispatch after the next one overwrites it. The
            call allocates no memory, and no result depends on a decision of the host.

        Raises
        ------
        InvalidArgument
            No data has moved and the buffer stays usable. Raised on all ranks, by the hook: .peer names the refusing
            rank if it is another one.
        ConfigMismatch
            Ranks differ in dtype, quantization or topk_weights; the buffer stays usable.
        PeerLost, PeerTimeout
            A peer has ended or does not respond; the communicator is broken.

        Source: DeepSeek-V3 technical report, section 3.4.2 (decoding: direct point-to-point transfers).
        """
        return self._decoding.dispatch(
            x, topk_ids, topk_weights, quant, scale_layout, return_hook, layer, num_experts
        )

    def decode_combine(
        self,
        rows: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        handle: DecodeHandle,
        *,
        wire: str | None = None,
        return_hook: bool = True,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Hook | None]:
        """Send the experts' rows of a decode_dispatch back and sum them. Collective.

        Parameters
        ----------
        rows : Tensor [experts per rank, size * decode_max_tokens, hidden] of the buffer's dtype
            In the layout of DecodeReceived.x. handle.rows is sent without a copy; do not change it before the hook.
        topk_ids : Tensor [T, top_k]
            The same as for decode_dispatch.
        topk_weights : Tensor [T, top_k] float32 or None
            None: ones. Must be None if decode_dispatch sent the weights.
        handle : DecodeHandle
            Handle of the dispatch. It is valid until the dispatch after the next one, for any number of combines, each
            after the hook of the one before. A further combine first waits until the peers have received the one
            before: pass its rows in another tensor than handle.rows, or handle.rows unchanged.
        wire : None, "fp8" or "logfmt10"
            Format of rows between nodes: unchanged, or encoded (and decoded for the FP32 sum).
        return_hook : bool
            True: only send; y is complete after the hook. False: do both.
        out : Tensor [T, hidden], optional
            Tensor for y. It must not overlap rows, ids, weights or a window of this buffer. None: a new tensor.

        Returns
        -------
        (y [T, hidden], hook)
            y[t] = sum over k of topk_weights[t, k] * row(t, k), in FP32 (FP64 for float64), by ascending k, rounded
            once. If decode_dispatch sent the weights, every rank computes this sum of its rows and rounds it; y is the
            sum over ranks in the order of each rank's first pick. Results are bit-identical from run to run.

        Raises
        ------
        InvalidArgument, ConfigMismatch, PeerLost, PeerTimeout
            As decode_dispatch. After a refusal the handle cannot be used again. Ranks that do not wait for the
            refusing rank complete their calls.

        Source: DeepSeek-V3 technical report, section 3.4.2.
        """
        return self._decoding.combine(rows, topk_ids, topk_weights, handle, wire, return_hook, out)

    def decode_lost_weight(
        self, topk_ids: torch.Tensor, topk_weights: torch.Tensor | None = None, *, layer: int = 0
    ) -> torch.Tensor:
        """Return the weight per token that a decode step loses, because no rank runs the expert. Local.

        These experts are on masked ranks, or have no slot in a partial placement. The step leaves their picks out, and
        with Buffer(renormalize=True) and a partial placement it scales the others up. The check runs on the current
        stream and can be captured: a graph that is replayed after mask() counts the masked ranks.

        Parameters
        ----------
        topk_ids, topk_weights, layer
            As for decode_dispatch. topk_weights=None: ones, so the result counts picks.

        Returns
        -------
        Tensor float32 [T]

        Raises
        ------
        InvalidArgument
            There was no decode_dispatch, or an argument has another shape or dtype.
        """
        return self._decoding.lost_weight(topk_ids, topk_weights, layer)

    # -- sizes ------------------------------------------------------------------------------------

    @property
    def hidden(self) -> Any:
        """Elements of a row. This and the next properties are None until the first call if they were not given."""
        return self.backend.memory.hidden

    @property
    def num_experts(self) -> Any:
        """Experts over all ranks; with a placement, slots over all ranks."""
        return self.backend.memory.num_experts

    @property
    def top_k(self) -> Any:
        """Picks per token."""
        return self.backend.memory.top_k

    @property
    def max_tokens(self) -> Any:
        """Maximum number of tokens of a rank in one call. Grows if it was not given."""
        return self.backend.memory.max_tokens

    @property
    def dtype(self) -> Any:
        """Dtype of rows in combine."""
        return self.backend.memory.dtype

    @property
    def channels(self) -> Any:
        """Number of independent slices of the tokens."""
        return self.backend.memory.channels

    @property
    def arena_bytes(self) -> Any:
        """Window memory for outputs, in bytes."""
        return self.backend.memory.arena_bytes

    @property
    def experts_per_rank(self) -> Any:
        """Local experts of a rank; with a placement, its slots."""
        return self.backend.memory.experts_per_rank

    @property
    def decode_max_tokens(self) -> Any:
        """Maximum number of tokens of a decode call."""
        return self.backend.memory.decode_max_tokens

    @property
    def num_sms(self) -> int:
        """Number of multiprocessors in the CUDA world."""
        return self.backend.memory.num_sms

    @property
    def name(self) -> str:
        """Name of this buffer in torch.ops.moecomm.* of this process."""
        return self.backend.name

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's windows (reserved; committed when touched). 0 before they are made."""
        return self.backend.memory.num_bytes

    @staticmethod
    def size_hint(
        comm: Communicator | None = None,
        *,
        hidden: int,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        num_sms: int = 20,
        channels: int | None = None,
        arena_bytes: int | None = None,
        decode: bool = False,
        decode_max_tokens: int | None = None,
        size: int | None = None,
        ranks_per_node: int | None = None,
    ) -> int:
        """Return the bytes that a Buffer with these arguments reserves on each rank, without allocating memory.

        Without a communicator, give `size` ranks, with `ranks_per_node` of them on a node (None: all).

        decode=True adds the memory of the decode path: proportional to size * decode_max_tokens * row bytes (for the
        messages), and to that times the experts per rank (for the packed rows, of which the cpu world commits only
        touched pages, and the cuda world all).

        Raises
        ------
        InvalidArgument
            As Buffer; both comm and size are given, or neither.
        """
        return shapes.size_hint(
            comm,
            hidden=hidden,
            num_experts=num_experts,
            top_k=top_k,
            max_tokens=max_tokens,
            dtype=dtype,
            num_sms=num_sms,
            channels=channels,
            arena_bytes=arena_bytes,
            decode=decode,
            decode_max_tokens=decode_max_tokens,
            size=size,
            ranks_per_node=ranks_per_node,
        )

    @staticmethod
    def arena_hint(
        comm: Communicator | None = None,
        *,
        hidden: int,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        dispatches: int = 2,
        size: int | None = None,
    ) -> int:
        """Return arena_bytes for `dispatches` dispatches held at the same time, if every token goes to one rank.

        Training holds one dispatch per layer until its backward has run, and the backward makes one more: dispatches =
        layers + 1 for layers that share a Buffer, plus one per layer if gradients of activations are kept. Memory is
        committed when it is first touched, so a large number only costs address space.

        The next dispatch has space whenever fewer than `dispatches` are held, regardless of their order. A capacity
        above this worst case, and the padding of expert_alignment, need additional memory.

        Raises
        ------
        InvalidArgument
            As size_hint; dispatches is not positive.
        """
        return shapes.arena_hint(
            comm,
            hidden=hidden,
            num_experts=num_experts,
            top_k=top_k,
            max_tokens=max_tokens,
            dtype=dtype,
            dispatches=dispatches,
            size=size,
        )

    # -- the rest ---------------------------------------------------------------------------------

    def register_hook(self, stage: str, fn: Callable[..., Any]) -> RemovableHandle:
        """Call fn at a stage of every dispatch and combine of this rank, except in backward.

        Parameters
        ----------
        stage : str
            "pre_dispatch": fn(x), "post_dispatch": fn(Dispatched), "pre_combine": fn(rows), "post_combine": fn(y).
            The result of fn is ignored. With async_op, "post" stages run in wait().
        fn : callable

        Returns
        -------
        torch.utils.hooks.RemovableHandle
            .remove() removes the hook.

        Raises
        ------
        InvalidArgument
            There is no such stage.
        """
        handle = self.backend.hooks.register(stage, fn)
        self.backend.find_fast_way()
        return handle

    @property
    def captured_bytes(self) -> int:
        """Bytes of the arena that are kept for calls in CUDA graphs (see release_captured). 0 in the cpu world."""
        return self.backend.memory.captured_bytes

    def release_captured(self) -> None:
        """Free the memory of captured calls. Local. Do not replay a CUDA graph with calls of this buffer afterwards.

        A captured dispatch keeps its piece of the arena and its plan, and a captured combine those of its dispatch,
        even after their last handle and tensor are freed, because every replay writes there again. Without this call
        they are kept until the buffer is closed, and every capture adds its own.
        """
        memory = self.backend.memory
        memory.require_open("release_captured")
        if memory.comm.gpu is not None:
            memory.native.release_captured()

    def stats(self) -> dict[str, Any]:
        """Return the numbers of rows and bytes per hop since the last call, and reset them.

        The result is a dict: rail and node, each {logical_rows, physical_rows, logical_bytes, physical_bytes}
        (physical: on the link of the hop), replicated_rows, quantized_rows, staged_rows, calls, exchanges (rounds in
        which every rank waited for the counts of all others). "decode" has the same for the decode path, if it was
        used.
        """
        self.backend.memory.require_open("stats")
        return self.backend.take_counters()

    def use(self, placement: Placement) -> None:
        """Use another placement of the same shape for the following batches. Collective.

        No batch mixes two placements.

        Raises
        ------
        InvalidArgument
            The buffer has no placement, or the new one has another shape.
        ConfigMismatch
            Ranks differ in the placement or its version. Raised on all ranks; the old placement stays in use.
        """
        self.backend.memory.require_open("use")
        if self.backend.router is None:
            raise InvalidArgument(
                "use: the buffer was made without a placement; expected Buffer(..., placement=...)",
                op="use",
                rank=self.comm.rank,
            )
        self.backend.router.use(placement)

    @property
    def masked(self) -> tuple[int, ...]:
        """The ranks that mask has masked."""
        decode = self.backend.memory.decode
        return () if decode is None else tuple(decode.masked)

    def mask(self, ranks: Iterable[int]) -> None:
        """Go on with the decode path without ranks that are dead. Collective over the others.

        Call it after a PeerLost or PeerTimeout, with the lost ranks of Communicator.agree. Windows, tensors and
        captured CUDA graphs stay. From the next step on (a replay, too) a pick of an expert of a masked rank counts as
        -1, and no rank sends to a masked rank or waits for it. Masked ranks cannot return. Steps from before the mask
        have no result; their handles and hooks are refused. Everything else of the communicator has ended with the
        lost rank: dispatch and combine raise PeerLost. docs/elastic.md has the guarantees and their limits.

        Parameters
        ----------
        ranks : iterable of int
            The same on all ranks that are left. Ranks that were masked before stay masked.

        Raises
        ------
        InvalidArgument
            A rank may live: only ranks whose process has ended can be masked (of run_local: whose function has
            returned). The buffer has not used its decode path, has a placement or a recording, or its ranks reach
            each other over UCX or NCCL.
        ConfigMismatch
            Ranks name different ranks.
        PeerTimeout, PeerLost
            A rank that is left does not come.
        """
        mask(self.backend, ranks)

    def close(self) -> None:
        """Release the windows; tensors that view them stay valid. Local, may be called twice.

        First waits for a running call of another thread, at most for its timeout. Inside a call of this thread (in a
        signal handler or a finalizer), the windows are released when that call returns.
        """
        self.backend.close()
