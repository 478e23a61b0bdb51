"""Buffer: the windows of one layer shape, and the two verbs on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from ._cuda import cuda

from . import ops
from ._native import core
from ._native.quant import scale_words
from .arguments import Arguments, require_comm
from .calls import Calls
from .decode import Decode, DecodeVerbs
from .env import Environment
from .errors import InvalidArgument
from ._cuda.record import DeviceRecorder
from .tracing.recorder import Recorder
from .refusals import made, take_part
from .results import BlockTensors, Dispatched, Handle
from .shapes import (
    DTYPES,
    QUANTS,
    SCALE_DTYPES,
    WIRES,
    arena_size,
    as_int,
    check_shape,
    decode_tokens,
    default_channels,
    reserved_bytes,
)
from .shared import Shared
from .tensors import address

if TYPE_CHECKING:
    import os
    from .balance import LoadMonitor, Placement
    from .communicator import Communicator


class Buffer(Arguments, Calls, DecodeVerbs, Shared):
    """Memory and state for dispatch and combine of one layer shape. Construction is collective.

    Parameters
    ----------
    comm : Communicator
    hidden : int
        Elements of a row; a row must be a multiple of 16 bytes.
    num_experts : int
        Over all ranks; divisible by comm.size. Expert e lives on rank e // (num_experts / size).
    top_k : int
        Picks per token, 1..32.
    max_tokens : int
        Most tokens that a rank dispatches in one call.
    dtype : torch.dtype
        Of rows in combine, and in dispatch unless they come quantized: bfloat16, float16, float32, float64.
    num_sms : int
        Multiprocessors for the CUDA world; the cpu world ignores it.
    channels : int, optional
        Independent slices of the tokens, each with its own pipeline.
    decode : bool
        Make the memory of the decode path now. False: the first decode_dispatch makes it (collectively).
    decode_max_tokens : int, optional
        Most tokens of a decode call, at most max_tokens (None: as many). Wants to be small on a GPU, which commits all of this memory.
    arena_bytes : int, optional
        Window memory for dispatch outputs and experts' outputs. None: twice the worst case of one
        dispatch (all tokens of all ranks to one rank); reserved, and committed when first touched.
    record : path-like, optional
        A folder: routing, times and traffic of every dispatch and combine are written there (moecomm.record). On a GPU
        that is not for CUDA graphs, whose replays no host sees.
    placement : moecomm.balance.Placement, optional
        topk_ids name logical experts then, and num_experts is their number; each batch chooses the replica of every
        pick, and the rest of the buffer sees slots: rank r's local experts are the slots of the placement. The host chooses: on a
        GPU every dispatch by topk_ids waits for them, and none of them can be captured into a CUDA graph (one by `handle` can).
    replicas : "local", "even" or "optimal"
        How (docs/balance.md): fewest nodes, even split, or lightest heaviest rank.
    activate : int, optional
        Slots that may run on a rank in one batch, of those that it hosts.
    renormalize : bool
        Where lost ranks leave experts without a replica: scale the weights of a token's other picks up.
    monitor : moecomm.balance.LoadMonitor, optional
        Gets the counts of every batch.

    Raises
    ------
    InvalidArgument
        An argument or a MOECOMM_* variable is wrong, on whichever rank: raised on every rank, and the message names it.
    ConfigMismatch
        Ranks disagree about an argument or MOECOMM_CHECK; raised on every rank.

    Source: DeepSeek-V3 technical report, section 3.2.2 (dispatch and combine over two networks).
    """

    def __init__(
        self,
        comm: Communicator,
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
        record: str | os.PathLike[str] | None = None,
        placement: Placement | None = None,
        replicas: str = "optimal",
        activate: int | None = None,
        renormalize: bool = False,
        monitor: LoadMonitor | None = None,
        decode_max_tokens: int | None = None,
    ) -> None:
        require_comm(comm)
        self.comm = comm
        comm._require_open("Buffer")
        on_gpu = comm._gpu is not None

        check, (hidden, num_experts, top_k, max_tokens, channels, arena_bytes, self.decode_max_tokens) = (
            self._agree(
                (hidden, num_experts, top_k, max_tokens, dtype, num_sms, channels, comm.rank, arena_bytes),
                decode,
                record,
                placement,
                replicas,
                activate,
                monitor,
                decode_max_tokens,
            )
        )
        self._replica_router = (  # with one, experts are slots from here on
            placement and placement.router_type(comm, placement, replicas, activate, renormalize, monitor)
        )
        self.num_sms = as_int(num_sms)
        if on_gpu:
            plan = cuda.plan_of(
                self,
                hidden=hidden,
                num_experts=num_experts,
                top_k=top_k,
                max_tokens=max_tokens,
                dtype=dtype,
                channels=channels,
            )
            channels, self._plan = plan.channels, plan
            comm._require_equal("Buffer", comm._exchange({"channels": channels}, "Buffer"))
        self.hidden, self.num_experts, self.top_k, self.max_tokens = hidden, num_experts, top_k, max_tokens
        self.dtype, self.channels, self.arena_bytes = dtype, channels, arena_bytes
        self.experts_per_rank = num_experts // comm.size

        def native():
            if on_gpu:
                return cuda.NativeBuffer(
                    comm, plan, hidden, DTYPES[dtype], num_experts, top_k, max_tokens, arena_bytes, check
                )
            return core.Buffer(
                comm._native,
                hidden,
                DTYPES[dtype],
                num_experts,
                top_k,
                max_tokens,
                channels,
                arena_bytes,
                check,
                self._replica_router.logical_experts if self._replica_router else 0,
            )

        self._native = comm._join("Buffer", native)
        self._native.connected()
        if comm._bootstrap.threads:
            comm._bootstrap.keep(self._native)
        self.number = ops.number_buffer(self)  # how torch.ops.moecomm.* name this buffer
        self._row_bytes, self._check, self._hooks = hidden * dtype.itemsize, check, {}
        # The fast path is one native call that checks its arguments itself; it knows no placement, hook or recorder of a GPU.
        self._can_use_fast_path = not on_gpu and placement is None
        recorder = DeviceRecorder if on_gpu else Recorder  # the last step that may fail on one rank alone
        self._recorder = comm._make_everywhere(
            "Buffer", lambda: None if record is None else recorder(record, self)
        )
        self._gpu_recorder = self._recorder if on_gpu else None  # on the host, native code records its calls
        # Who chooses replicas: where tensors are on a GPU, a buffer on the host beside this one, which exchanges picks and moves no row.
        self._host_router_buffer = None
        if on_gpu and placement is not None:
            self._host_router_buffer = Buffer(
                comm._on_host(),
                hidden=8,
                num_experts=placement.num_experts,
                top_k=top_k,
                max_tokens=max_tokens,
                arena_bytes=1 << 16,
                placement=placement,
                replicas=replicas,
                activate=activate,
            )
        self._choosing_native = self._host_router_buffer._native if self._host_router_buffer else self._native
        self._closed = self._tracing = False
        self._decode = Decode(self) if decode else None

    # -- sizes ------------------------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's windows (reserved; committed when touched)."""
        c = self.comm
        return reserved_bytes(
            c,
            self.hidden,
            self.num_experts,
            self.top_k,
            self.max_tokens,
            self.dtype,
            self.channels,
            self.arena_bytes,
            self._decode is not None and self.decode_max_tokens,
        )

    @staticmethod
    def size_hint(
        comm: Communicator,
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
    ) -> int:
        """Bytes that a Buffer with these arguments would reserve on each rank; allocates nothing.

        With decode=True also what the decode path reserves: proportional to size * decode_max_tokens * row bytes (for
        the messages), and to that times the experts per rank (for the packed rows, of which the cpu world commits only
        what is touched, and the cuda world all).

        Raises
        ------
        InvalidArgument
            As Buffer.
        """
        require_comm(comm)
        hidden, num_experts, top_k, max_tokens, num_sms, channels, arena_bytes = check_shape(
            comm.size,
            hidden,
            num_experts,
            top_k,
            max_tokens,
            dtype,
            num_sms,
            channels,
            comm.rank,
            arena_bytes,
        )
        channels = channels or Environment().channels or default_channels(comm.num_nodes)
        arena_bytes = arena_bytes or arena_size(comm.size, hidden, num_experts, top_k, max_tokens, dtype)
        tokens = decode_tokens(decode_max_tokens, max_tokens, comm.rank)
        return reserved_bytes(
            comm, hidden, num_experts, top_k, max_tokens, dtype, channels, arena_bytes, decode and tokens
        )

    @staticmethod
    def arena_hint(
        comm: Communicator,
        *,
        hidden: int,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        dispatches: int = 2,
    ) -> int:
        """The arena_bytes for `dispatches` dispatches that are held at once, when every token goes to one rank.

        Training holds one per layer until its backward has run, and its backward makes one more: dispatches = layers + 1 for
        layers that share a Buffer, plus one per layer where gradients of activations are kept too. Memory is committed
        when it is first touched, so a generous number costs address space alone.

        Room for the next dispatch is there whenever fewer than `dispatches` are held, in whatever order they come and go. A
        capacity beyond that worst case, or the padding of expert_alignment, comes on top.

        Raises
        ------
        InvalidArgument
            As Buffer; dispatches is not positive.
        """
        check_shape(comm.size, hidden, num_experts, top_k, max_tokens, dtype, 20, None, comm.rank)
        if not isinstance(dispatches, int) or dispatches < 1:
            raise InvalidArgument(
                f"arena_hint: dispatches is {dispatches!r}; expected an int >= 1",
                op="arena_hint",
                rank=comm.rank,
            )
        return arena_size(comm.size, hidden, num_experts, top_k, max_tokens, dtype, dispatches)

    # -- dispatch ---------------------------------------------------------------------------------

    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
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
    ) -> Any:
        """Carry every token to the ranks that own its experts. Collective.

        Parameters
        ----------
        x : Tensor [T, hidden], or (fp8 Tensor [T, hidden], scales [T, hidden/128] f32 or [T, hidden/512] int32)
            T may differ between ranks and be 0. int32 scales are UE8M0, as moecomm.quant packs them.
        topk_ids : Tensor [T, top_k] int64 or int32
            Global expert ids, distinct in a token; -1: no expert. Left out with `handle`.
        topk_weights : Tensor [T, top_k] float32, optional
            Travel with the rows.
        layout : "expert" or "rank"
            One row per (token, expert), grouped by expert; or one row per (token, destination rank).
        expert_alignment : int
            Every expert's rows are padded with zero rows to a multiple of this (expert layout).
        quant : None, "fp8" or "fp8_ue8m0"
            Rows of the buffer's dtype travel and arrive as moecomm.quant.quantize codes them, with f32 or
            power-of-two scales: each row is read and quantized once, on its way out.
        scale_layout : "row" or "column"
            Of quantized rows' scales at the receiver: strides (scales, 1), or (1, N rounded up to a multiple of 4).
        handle : Handle, optional
            Reuse the plan of an earlier dispatch: no counts are exchanged.
        capacity : int, optional
            Static number of rows of the result; rows beyond the real ones are zero.
        async_op : bool
            Return a Pending; the call runs on the communicator's progress thread.
        check : bool
            Also refuse NaN in topk_weights.
        layer : int
            Of the placement, where the buffer has one.

        Returns
        -------
        Dispatched
            .x [N, hidden], .scales, .tokens_per_expert int64 [experts per rank], .rows_per_expert,
            .topk_weights, .topk_ids, .handle. The tensors are views of the window: nothing was copied
            out, and the piece is freed with the last of them. Row order: (local expert, source rank,
            source token), or (source rank, source token) in the rank layout.

        Raises
        ------
        InvalidArgument
            Nothing moved and the buffer stays usable. On every rank: .peer names the one that refuses its part, if it is another.
        CapacityExceeded, ConfigMismatch
            On every rank; the buffer stays usable. Ranks that make different calls break the communicator.
        PeerLost, PeerTimeout
            A peer is gone or stalled; the communicator is broken.

        Source: DeepSeek-V3 technical report, section 3.2.2.
        """
        op = "dispatch"
        if (
            self._can_use_fast_path
            and self.comm._ready
            and handle is None
            and quant is None
            and capacity is None
            and not async_op
            and not check
            and scale_layout == "row"
            and not is_dynamo_compiling()
        ):
            out = self._native.try_dispatch(self, x, topk_ids, topk_weights, layout, expert_alignment)
            if out is not None:
                return out
        self._require_open(op)
        call = (
            self._dispatch,
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
        )
        return call[0](*call[1:]) if is_dynamo_compiling() else take_part(self, op, handle, *call)

    def _dispatch(
        self,
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
    ):
        op, expert_alignment, capacity = "dispatch", as_int(expert_alignment), as_int(capacity)
        x, scales = self._as_rows(op, x)
        if handle is not None:
            if layout != "expert" or expert_alignment != 1 or capacity is not None:
                self._refuse(
                    op, "layout, expert_alignment and capacity come from the handle; expected them left out"
                )
            self._check_handle(op, handle)
            layout, capacity = handle.layout, handle._capacity
        topk_ids = self._as_tensor(op, "topk_ids", topk_ids, optional=True)
        topk_weights = self._as_tensor(op, "topk_weights", topk_weights, optional=True)
        self._check_dispatch(x, scales, topk_ids, topk_weights, layout, expert_alignment, capacity, handle)
        self._check_quant(op, quant, scale_layout, scales)
        if check and topk_weights is not None and bool(torch.isnan(topk_weights).any()):
            self._refuse(op, "topk_weights holds NaN; expected numbers (check=True)")
        lost = None
        if self._replica_router is not None and handle is None:
            self._replica_router.require_layer(op, layer)
            topk_weights, lost = self._replica_router.account(topk_ids, topk_weights, layer)
        through_ops = ops.wanted(x, topk_weights)
        if through_ops and scales is not None and x.requires_grad:
            self._refuse(
                op, "x is quantized and requires a gradient, which FP8 rows cannot carry; expected x.detach()"
            )
        if through_ops and (quant is not None or scale_layout != "row"):
            self._refuse(
                op,
                f"quant is {quant!r} and scale_layout {scale_layout!r} where a gradient is wanted or a graph is traced; expected None and "
                "'row': FP8 rows carry no gradient (docs/training.md shows a dispatch with a backward of your own)",
            )
        if through_ops:
            return self._call(
                op,
                self._dispatch_by_ops,
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
        return self._call(
            op,
            self._dispatch_natively,
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
        )

    def _dispatch_natively(
        self,
        x,
        scales,
        topk_ids,
        topk_weights,
        layout,
        expert_alignment,
        capacity,
        handle=None,
        quant=None,
        by_column=False,
        lost=None,
        layer=0,
    ):
        kind = QUANTS[quant] if scales is None else SCALE_DTYPES.index(scales.dtype)
        row_bytes = self.hidden if kind else self._row_bytes
        scale_bytes = 4 * scale_words(self.hidden, kind)
        request = None
        if self._host_router_buffer is not None and handle is None:
            topk_ids = self._replica_router.choose(self, "dispatch", topk_ids, layer)
        elif self._replica_router is not None and handle is None:
            request = self._replica_router.request(topk_ids, layer)
            topk_ids = request.ids
        began = self._gpu_recorder and self._gpu_recorder.start()
        made(self)
        result = self._native.dispatch(
            address(x),
            address(scales),
            address(topk_ids),
            topk_ids is not None and topk_ids.dtype == torch.int32,
            address(topk_weights),
            x.shape[0],
            layout == "rank",
            expert_alignment,
            -1 if capacity is None else capacity,
            row_bytes,
            scale_bytes,
            None if handle is None else handle._plan,
            kind,
            by_column,
            request and request.native,
        )
        if type(result) is not tuple:
            self._fail("dispatch", result)
        plan, block, output = result
        if request is not None:
            self._replica_router.record(request, layer)
            topk_ids = request.slots
        if self._gpu_recorder:
            self._gpu_recorder.dispatch(
                began,
                plan,
                topk_ids,
                topk_weights,
                x.shape[0],
                layout,
                expert_alignment,
                capacity,
                list(QUANTS)[kind],
            )
        handle = self._handle_of(layout, capacity, plan, output)
        out = Dispatched(handle, lost)
        out._tensors = BlockTensors(
            handle,
            block,
            torch.float8_e4m3fn if kind else x.dtype,
            row_bytes,
            scale_bytes,
            SCALE_DTYPES[kind],
            by_column,
        )
        return out

    def _dispatch_by_ops(
        self,
        x,
        scales,
        topk_ids,
        topk_weights,
        layout,
        expert_alignment,
        capacity,
        handle,
        lost=None,
        layer=0,
    ):
        if handle is not None:
            rows, row_scales, weights, ids, source = ops.redispatch(
                x, topk_weights, scales, handle.tensor(), self.number, layout, handle.num_rows
            )
            return self._dispatched_by_ops(
                handle, lost, rows, None if scales is None else row_scales, weights, ids, source
            )
        rows, row_scales, weights, ids, source, tokens, padded, ticket = ops.dispatch(
            x, topk_ids, topk_weights, scales, self.number, layout, expert_alignment, capacity, layer
        )
        handle = Handle(
            self, layout, capacity, rows.shape[0], x.shape[0], tensor=ticket, counts=(tokens, padded)
        )
        return self._dispatched_by_ops(
            handle, lost, rows, None if scales is None else row_scales, weights, ids, source
        )

    def _dispatched_by_ops(self, handle, lost, rows, scales, weights, ids, source):
        out = Dispatched(handle, lost)
        out.x, out.scales, out.topk_weights, out._source = rows, scales, weights, source
        out.topk_ids = None if handle.layout == "expert" else ids
        return out

    # -- combine ----------------------------------------------------------------------------------

    def combine(
        self,
        rows: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        wire: str | None = None,
        async_op: bool = False,
        check: bool = False,
        out: torch.Tensor | None = None,
    ) -> Any:
        """Carry the experts' rows back to the tokens' ranks and sum them. Collective.

        Parameters
        ----------
        rows : Tensor [N, hidden] of the buffer's dtype
            handle.rows (written in place: nothing is copied), or any tensor (staged once).
        handle : Handle
            Of the dispatch to undo.
        topk_weights : Tensor [N] float32, optional
            Expert layout: y[t] = sum of topk_weights[row] * rows[row] over the token's rows; 1 where None.
        bias : Tensor [hidden] or [T, hidden] float32, optional
            Added in FP32 before the one rounding.
        wire : None, "fp8" or "logfmt10"
            How other nodes' sums come to this rank: rounded to dtype, or as moecomm.quant.encode_wire codes their
            FP32 values. Rows of this rank's node are not touched. Each rank chooses for itself.
        async_op, check : bool
            As for dispatch.
        out : Tensor [T, hidden], optional
            Where the result goes, apart from rows, weights and bias and outside this buffer's windows; a new tensor where None.

        Returns
        -------
        Tensor [T, hidden]
            Summed in FP32 (FP64 for float64), ascending expert within ascending rank within ascending
            node; the sum of another node arrives rounded once, as `wire` says, and is added in FP32. Bit-identical from run to run.

        Raises
        ------
        InvalidArgument, PeerLost, PeerTimeout
            As dispatch.

        Source: DeepSeek-V3 technical report, section 3.2.2.
        """
        op = "combine"
        if (
            self._can_use_fast_path
            and self.comm._ready
            and bias is None
            and wire is None
            and not async_op
            and not check
            and not is_dynamo_compiling()
        ):
            y = self._native.try_combine(self, rows, handle, topk_weights, out)
            if y is not None:
                return y
        self._require_open(op)
        call = self._combine, rows, handle, topk_weights, bias, wire, async_op, check, out
        return call[0](*call[1:]) if is_dynamo_compiling() else take_part(self, op, handle, *call)

    def _combine(self, rows, handle, topk_weights, bias, wire, async_op, check, out):
        op = "combine"
        self._check_handle(op, handle)
        rows = self._as_tensor(op, "rows", rows)
        topk_weights = self._as_tensor(op, "topk_weights", topk_weights, optional=True)
        bias = self._as_tensor(op, "bias", bias, optional=True)
        out = self._as_tensor(op, "out", out, optional=True, written=True)
        self._check_combine(rows, handle, topk_weights, bias, out, wire)
        if check and topk_weights is not None and bool(torch.isnan(topk_weights).any()):
            self._refuse(op, "topk_weights holds NaN; expected numbers (check=True)")
        through_ops = ops.wanted(rows, topk_weights, bias)
        if through_ops and out is not None:
            self._refuse(op, "out is given where a gradient is wanted or a graph is traced; expected None")
        run = self._combine_by_ops if through_ops else self._combine_natively
        return self._call(op, run, async_op, through_ops, rows, handle, topk_weights, bias, out, wire)

    def _combine_natively(self, rows, handle, topk_weights, bias, out=None, wire=None, back=None):
        tokens = handle.num_tokens
        y = (
            torch.empty((tokens, self.hidden), dtype=self.dtype, device=self.comm.device)
            if out is None
            else out
        )
        bias_stride = 0
        if bias is not None:
            bias = bias.to(torch.float32).contiguous()
            bias_stride = self.hidden if bias.dim() == 2 else 0
        # A rank without tokens asks for slots too: its peers' values pass through it.
        slots = (
            None
            if back is None
            else torch.empty((max(tokens, 1), self.top_k), dtype=torch.float32, device=self.comm.device)
        )
        began = self._gpu_recorder and self._gpu_recorder.start()
        made(self)
        failure = self._native.combine(
            address(rows),
            address(topk_weights),
            address(y),
            address(bias),
            bias_stride,
            handle._plan,
            handle._output,
            address(back),
            address(slots),
            WIRES[wire],
        )
        if failure is not None:
            self._fail("combine", failure)
        if self._gpu_recorder:
            self._gpu_recorder.combine(
                began, handle._plan, tokens, topk_weights is not None, handle.layout, wire
            )
        return y if back is None else (y, slots[:tokens])

    def _combine_by_ops(self, rows, handle, topk_weights, bias, out=None, wire=None):
        return ops.combine(
            rows, topk_weights, bias, handle.tensor(), self.number, handle.layout, handle.num_tokens, wire
        )

    # -- the rest ---------------------------------------------------------------------------------

    def use(self, placement: Placement) -> None:
        """Serve the batches from here on by another placement of the same shape. Collective: no batch mixes two of them.

        Raises
        ------
        InvalidArgument
            The buffer has no placement, or the new one has another shape.
        ConfigMismatch
            Ranks disagree about the placement or its version; raised on every rank, and the old one stays.
        """
        self._require_open("use")
        if self._replica_router is None:
            raise InvalidArgument(
                "use: the buffer was made without a placement; expected Buffer(..., placement=...)",
                op="use",
                rank=self.comm.rank,
            )
        self._replica_router.use(placement)

    def close(self) -> None:
        """Release the windows; tensors that view them stay valid. Local, may be called twice.

        Waits for a call that another thread has under way, which its timeout bounds. From within a call of this thread (a signal handler
        or a finalizer runs while it waits): when that call has returned.
        """
        if not self._closed:
            self._closed, self._can_use_fast_path = True, False
            if not self.comm._native.after_call(self._release):
                self._release()
