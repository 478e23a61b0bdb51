"""Buffer: deep_ep's first interface, normal mode. Its low-latency verbs are in low_latency.py."""

from __future__ import annotations

import torch

from ._checks import IDS, aligned, capturing, check_experts, check_int, check_rows, sum_of_biases
from ._normal import check_dispatch, layout_of, routing_of
from ._routing import Payload, Routing
from ._world import world_of
from .config import Config
from .errors import Unsupported, refuse, require_tensor
from .events import EventHandle, EventOverlap, event_of, wait_before
from .handles import DispatchHandle
from .low_latency import LowLatency
from .runtime import Runtime

_NAMES = "previous_event", "async_finish"


class Buffer(LowLatency):
    """Expert-parallel dispatch and combine by deep_ep's names, over moecomm. Construction is collective.

    Memory is not made here: it follows the shapes of the calls, is shared by all Buffers of one group in a
    process, and grows.

    Parameters
    ----------
    group : torch ProcessGroup, one-dimensional DeviceMesh or moecomm.Communicator
        The ranks; None with `comm`.
    num_nvl_bytes, num_rdma_bytes : int
        Kept as attributes; no limit to anything.
    low_latency_mode : bool
        The low-latency verbs may be called.
    num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric, allow_nvlink_for_normal_mode
        Without meaning here: moecomm finds its links itself.
    explicitly_destroy : bool
        destroy() may be called; without it a Buffer ends with the process or moecomm.integrations.deep_ep.shutdown().
    enable_shrink : bool
        The verbs of rank masks may be called (see low_latency_update_mask_buffer for what they can do).
    comm : mpi4py Comm, optional
        In place of group.

    Raises
    ------
    InvalidArgument
        An argument is wrong, or neither or both of group and comm are given.
    """

    num_sms = 20

    def __init__(
        self,
        group,
        num_nvl_bytes=0,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=24,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        use_fabric=False,
        explicitly_destroy=False,
        enable_shrink=False,
        comm=None,
        *,
        allow_nvlink_for_normal_mode=True,
    ):
        if (group is None) == (comm is None):
            refuse(
                "Buffer",
                "group and comm are both None or both given; expected a ProcessGroup as group, or "
                "group=None and an mpi4py Comm as comm",
            )
        for name, value in {
            "num_nvl_bytes": num_nvl_bytes,
            "num_rdma_bytes": num_rdma_bytes,
            "num_qps_per_rank": num_qps_per_rank,
        }.items():
            check_int("Buffer", name, value, 0)
        self.group = comm if group is None else group
        self._world = world_of(self.group)
        self.rank, self.group_size = self._world.rank, self._world.size
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = bool(low_latency_mode), bool(enable_shrink)
        self.explicitly_destroy = bool(explicitly_destroy)
        self._destroyed = False
        self.runtime = Runtime(self)

    # -- statics ----------------------------------------------------------------------------------

    @staticmethod
    def set_num_sms(new_num_sms):
        """Multiprocessors for kernels on a GPU, even; of core Buffers that are made from here on."""
        if (
            isinstance(new_num_sms, bool)
            or not isinstance(new_num_sms, int)
            or new_num_sms < 2
            or new_num_sms % 2
        ):
            refuse("set_num_sms", f"got {new_num_sms!r}; expected an even int >= 2")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture():
        """An EventOverlap of the current stream's work so far."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks):
        """The Config that dispatch takes where it gets none. A plain attribute: callers may replace it."""
        return _default_config("get_dispatch_config", num_ranks)

    @staticmethod
    def get_combine_config(num_ranks):
        """The Config that combine takes where it gets none. A plain attribute: callers may replace it."""
        return _default_config("get_combine_config", num_ranks)

    @staticmethod
    def is_sm90_compiled():
        """Whether the kernels use what sm_90 has; deep_ep's callers ask before they choose FP8."""
        return True

    # -- normal mode ------------------------------------------------------------------------------

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        """Count what a routing sends where. Local: no rank waits for another.

        Parameters
        ----------
        topk_idx : Tensor [T, K] int64 or int32
            Global expert ids; -1: no expert.
        num_experts : int
        previous_event, async_finish, allocate_on_comm_stream
            As for dispatch.

        Returns
        -------
        (num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank, event)
            int32 [ranks], int32 [nodes] or None on one node, int32 [num_experts], bool [T, ranks], EventOverlap.

        Raises
        ------
        InvalidArgument
        """
        op = "get_dispatch_layout"
        self._require_usable(op)
        wait_before(op, previous_event, async_finish, allocate_on_comm_stream, _NAMES)
        ids = require_tensor(op, "topk_idx", topk_idx, dtypes=IDS, shape=(None, None))
        check_experts(op, num_experts, self.group_size, self.rank)
        if not capturing() and ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < num_experts:
            refuse(
                op,
                f"topk_idx holds ids from {int(ids.min())} to {int(ids.max())}; expected -1 (none) or ids "
                f"below num_experts = {num_experts}",
                self.rank,
            )
        per_expert, in_rank = layout_of(ids, num_experts, self.group_size)
        per_rdma_rank = None
        if self._world.num_nodes > 1:
            per_rdma_rank = in_rank.unflatten(1, (self._world.num_nodes, -1)).any(2).sum(0, dtype=torch.int32)
        return (
            in_rank.sum(0, dtype=torch.int32),
            per_rdma_rank,
            per_expert,
            in_rank,
            event_of(async_finish, topk_idx),
        )

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
        num_worst_tokens=0,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        """Carry every token to the ranks that own its experts, one row per token and rank. Collective.

        Without a handle it costs one small exchange more than moecomm.Buffer.dispatch, in which ranks agree
        on the largest number of tokens and learn of a peer that refuses its arguments. Rows come in order
        (source rank, source token).

        Parameters
        ----------
        x : Tensor [T, H], or (rows [T, H], scales [T, n])
            A row is a multiple of 16 bytes. FP8 rows with float32 scales per 128 or packed int32 ones
            travel as moecomm's pairs; other dtypes and scales travel uninterpreted. T may differ between
            ranks and be 0.
        handle : optional
            Of an earlier dispatch: its plan is used again; the layout, ids and weights must be left out.
        num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert : Tensor
            As get_dispatch_layout gives them for topk_idx. num_tokens_per_rdma_rank is not looked at.
        topk_idx : Tensor [T, K] int64 or int32, optional
            None: rows go where is_token_in_rank says, and no ids arrive.
        topk_weights : Tensor [T, K] float32, optional
        expert_alignment : int
            Numbers in the list of received tokens per expert are rounded up to a multiple of it; rows are not padded.
        num_worst_tokens : int
            Static number of received rows; those behind the real ones are zero with ids -1. 0: as many as arrive.
        config : Config, optional
            Checked, and without effect.
        previous_event : EventOverlap, optional
            Waited for first.
        async_finish, allocate_on_comm_stream : bool
            async_finish: the last result has an event. The call runs on the current stream in any case.

        Returns
        -------
        (recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, event)
            recv_topk_idx int64 [N, K] local ids, -1 elsewhere; the list is [] with num_worst_tokens. With a handle:
            (recv_x, None, None, None, None, event).

        Raises
        ------
        InvalidArgument
            On every rank, where one rank's arguments are wrong (by a handle: on that rank alone).
        ConfigMismatch
            Ranks make different calls or pass different shapes.
        CapacityExceeded
            More rows than num_worst_tokens; raised on every rank.
        PeerLost, PeerTimeout
            A peer is gone or stalled.
        """
        op = "dispatch"
        self._require_usable(op)
        self._check_config(op, config, "get_dispatch_config")
        if handle is not None:
            return self._dispatch_again(
                x,
                handle,
                (
                    num_tokens_per_rank,
                    num_tokens_per_rdma_rank,
                    is_token_in_rank,
                    num_tokens_per_expert,
                    topk_idx,
                    topk_weights,
                ),
                num_worst_tokens,
                previous_event,
                async_finish,
                allocate_on_comm_stream,
            )
        refusal, same, tokens = None, {}, 0
        try:
            wait_before(op, previous_event, async_finish, allocate_on_comm_stream, _NAMES)
            payload, ids, weights, counts = check_dispatch(
                self._world,
                x,
                num_tokens_per_rank,
                is_token_in_rank,
                num_tokens_per_expert,
                topk_idx,
                topk_weights,
                expert_alignment,
                num_worst_tokens,
            )
            experts, tokens = num_tokens_per_expert.numel(), payload.tokens
            same = {
                **payload.same,
                "num_experts": experts,
                "top_k": ids.shape[1],
                "num_worst_tokens": num_worst_tokens,
                "topk_idx given": topk_idx is not None,
                "topk_weights given": weights is not None,
            }
        except Exception as error:  # noqa: BLE001 - agree raises it, here and as InvalidArgument on the peers
            refusal = error
        most = (
            tokens
            if capturing() and refusal is None
            else self._world.agree(op, same=same, most=(tokens,), refusal=refusal)[0]
        )
        if topk_idx is None:  # who receives how much for which expert, as the caller counted it
            counts = self._world.scatter(counts.view(self.group_size, -1)).sum(0)
        with torch.no_grad():
            routing = Routing(
                self._world,
                ids,
                experts,
                most,
                Buffer.num_sms,
                dict(layout="rank", capacity=num_worst_tokens or None),
            )
            out = routing.dispatch(payload.hidden, payload.dtype, payload.x, weights)
            recv_x = payload.received(out)
        recv_ids, recv_weights, per_expert = None, None, []
        if topk_idx is not None:
            recv_ids, recv_weights = out.topk_ids, None if weights is None else out.topk_weights
            counts = out.tokens_per_expert
        if not num_worst_tokens:
            per_expert = aligned(counts.tolist(), expert_alignment)
        return (
            recv_x,
            recv_ids,
            recv_weights,
            per_expert,
            DispatchHandle(routing),
            event_of(async_finish, x, ids, weights),
        )

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        """Carry the experts' rows back and sum them, without weights. Collective.

        Parameters
        ----------
        x : Tensor [N, H] of bfloat16, float16, float32 or float64
            A row for every received one. H and dtype may differ from dispatch's: the first such combine of
            a handle then costs one more dispatch.
        handle
            Of the dispatch to undo; it may be combined as often as wanted.
        topk_weights : Tensor [N, K] float32, optional
            Summed over all rows of a token, not only those of the rank that owns the pick: ones give the
            number of rows. The first time for a handle that costs a small dispatch, and every time a small combine.
        bias : Tensor [T, H], or a pair of them, optional
            Added in FP32 before the one rounding.
        config, previous_event, async_finish, allocate_on_comm_stream
            As for dispatch.

        Returns
        -------
        (combined_x, combined_topk_weights, event)
            [T, H] of x's dtype, float32 [T, K] or None, EventOverlap.

        Raises
        ------
        InvalidArgument
            Here alone; peers that made the call wait for this rank until their deadline.
        PeerLost, PeerTimeout
        """
        op = "combine"
        self._require_usable(op)
        self._check_config(op, config, "get_combine_config")
        wait_before(op, previous_event, async_finish, allocate_on_comm_stream, _NAMES)
        routing = routing_of(op, handle, self._world)
        rows = check_rows(op, x, routing.num_rows, self.rank)
        numbers = require_tensor(
            op,
            "topk_weights",
            topk_weights,
            optional=True,
            dtypes=(torch.float32,),
            shape=(routing.num_rows, None),
        )
        bias = sum_of_biases(op, bias, (routing.tokens, rows.shape[1]), self.rank)
        with torch.no_grad():
            y = routing.combine(rows, bias)
            summed = None if numbers is None else routing.combine_numbers(numbers)
        return y, summed, event_of(async_finish, x, topk_weights)

    # -- the rest ---------------------------------------------------------------------------------

    def get_comm_stream(self):
        """The stream that calls run on: the current one. None on the CPU, which has no streams."""
        return (
            torch.cuda.current_stream(self._world.comm.device)
            if self._world.comm.device.type == "cuda"
            else None
        )

    def get_local_buffer_tensor(self, dtype, size=None, offset=0, use_rdma_buffer=False):
        """Not there: memory belongs to shapes, not to a Buffer of bytes.

        Raises
        ------
        Unsupported
            Always.
        """
        raise Unsupported(
            "get_local_buffer_tensor: moecomm's windows are laid out by shape and hold no raw bytes for "
            "the caller; expected "
            "torch.empty for scratch memory",
            op="get_local_buffer_tensor",
            rank=self.rank,
        )

    def destroy(self):
        """End this Buffer; its handles stay usable with other Buffers of the group. Needs explicitly_destroy=True."""
        if not self.explicitly_destroy:
            refuse(
                "destroy",
                "the Buffer was made with explicitly_destroy=False; expected Buffer(..., explicitly_destroy=True)",
                self.rank,
            )
        self._destroyed = True

    def _require_usable(self, op):
        if self._destroyed:
            refuse(op, "the Buffer was destroyed; expected a new one", self.rank)
        self._world.require_open(op)

    def _check_config(self, op, config, default):
        config = getattr(self, default)(self.group_size) if config is None else config
        if not isinstance(config, Config):
            refuse(op, f"config is a {type(config).__qualname__}; expected a Config", self.rank)

    def _dispatch_again(
        self, x, handle, left_out, worst, previous_event, async_finish, allocate_on_comm_stream
    ):
        op = "dispatch"
        wait_before(op, previous_event, async_finish, allocate_on_comm_stream, _NAMES)
        routing, payload = routing_of(op, handle, self._world), Payload(op, x)
        if any(value is not None for value in left_out[4:]):
            refuse(op, "topk_idx or topk_weights are given with a handle; expected neither", self.rank)
        if worst and worst != routing.how["capacity"]:
            refuse(
                op,
                f"num_worst_tokens is {worst} and the handle's is {routing.how['capacity'] or 0}; expected it left out",
                self.rank,
            )
        if payload.tokens != routing.tokens:
            refuse(op, f"x has {payload.tokens} tokens; the handle is for {routing.tokens}", self.rank)
        with torch.no_grad():
            recv_x = payload.received(routing.dispatch(payload.hidden, payload.dtype, payload.x))
        return recv_x, None, None, None, None, event_of(async_finish, x)


def _default_config(op, num_ranks):
    check_int(op, "num_ranks", num_ranks, 1)
    return Config(Buffer.num_sms)
