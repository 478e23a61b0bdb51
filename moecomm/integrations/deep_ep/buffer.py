"""Buffer: the normal mode of deep_ep's first interface. low_latency.py has its low-latency verbs."""

from __future__ import annotations

import torch

from ._checks import IDS, aligned, capturing, check_experts, check_int, check_rows, sum_of_biases
from ._normal import check_dispatch, layout_of, routing_of
from ._routing import Payload, Routing
from ._reporting import Reporting
from ._world import world_of
from .config import Config
from .errors import Unsupported, refuse, require_tensor
from .events import EventHandle, EventOverlap, event_of, wait_before
from .handles import DispatchHandle
from .low_latency import LowLatency
from .runtime import Runtime

_NAMES = "previous_event", "async_finish"


class Buffer(LowLatency):
    """Expert-parallel dispatch and combine with deep_ep's interface, over moecomm. Construction is collective.

    The constructor reserves no memory. The first call of a shape does. All Buffers of one group in a process share
    the memory, and it grows.

    Parameters
    ----------
    group : torch ProcessGroup, one-dimensional DeviceMesh or moecomm.Communicator
        The ranks. None if `comm` is given.
    num_nvl_bytes, num_rdma_bytes : int
        Stored as attributes. They limit nothing.
    low_latency_mode : bool
        Allow the low-latency verbs.
    num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric, allow_nvlink_for_normal_mode
        Ignored: moecomm chooses its links itself.
    explicitly_destroy : bool
        Allow destroy(). Otherwise a Buffer lives until moecomm.integrations.deep_ep.shutdown() or the end of the
        process.
    enable_shrink : bool
        Allow the verbs of rank masks. See low_latency_update_mask_buffer for their limits.
    comm : mpi4py Comm, optional
        The ranks, instead of group.

    Raises
    ------
    InvalidArgument
        An argument is wrong, or not exactly one of group and comm is given.
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
        self.world = world_of(self.group)
        self.rank, self.group_size = self.world.rank, self.world.size
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = bool(low_latency_mode), bool(enable_shrink)
        self.explicitly_destroy = bool(explicitly_destroy)
        self.destroyed = False
        self.runtime = Runtime(self)

    # -- statics ----------------------------------------------------------------------------------

    @staticmethod
    def set_num_sms(new_num_sms):
        """Set the number of multiprocessors of GPU kernels, an even number, for core Buffers made from now on."""
        if (
            isinstance(new_num_sms, bool)
            or not isinstance(new_num_sms, int)
            or new_num_sms < 2
            or new_num_sms % 2
        ):
            refuse("set_num_sms", f"new_num_sms is {new_num_sms!r}; expected an even int >= 2")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture():
        """Return an EventOverlap of all work that the current stream has so far."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks):
        """Return the default Config of dispatch. Callers may replace this method."""
        return _default_config("get_dispatch_config", num_ranks)

    @staticmethod
    def get_combine_config(num_ranks):
        """Return the default Config of combine. Callers may replace this method."""
        return _default_config("get_combine_config", num_ranks)

    @staticmethod
    def is_sm90_compiled():
        """Return True: FP8 is always available. Callers of deep_ep ask this before they choose FP8."""
        return True

    # -- normal mode ------------------------------------------------------------------------------

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        """Count the tokens that a routing sends to each rank, node and expert. Local.

        Parameters
        ----------
        topk_idx : Tensor [T, K] int64 or int32
            Global expert ids. -1: no expert.
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
            An argument is wrong.
        """
        op = "get_dispatch_layout"
        self._require_usable(op)
        wait_before(op, previous_event, async_finish, allocate_on_comm_stream, _NAMES)
        ids = require_tensor(op, "topk_idx", topk_idx, dtypes=IDS, shape=(None, None))
        check_experts(op, num_experts, self.group_size, self.rank)
        if not capturing() and ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < num_experts:
            refuse(
                op,
                f"topk_idx contains ids from {int(ids.min())} to {int(ids.max())}; expected -1 (no expert) or ids "
                f"below num_experts = {num_experts}",
                self.rank,
            )
        per_expert, in_rank = layout_of(ids, num_experts, self.group_size)
        per_rdma_rank = None
        if self.world.num_nodes > 1:
            per_rdma_rank = in_rank.unflatten(1, (self.world.num_nodes, -1)).any(2).sum(0, dtype=torch.int32)
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
        """Send every token to the ranks that own its experts, one row per token and rank. Collective.

        Without a handle, ranks first agree on the maximum number of tokens and learn whether a peer refuses its
        arguments. This costs one small exchange more than moecomm.Buffer.dispatch. Received rows are ordered by
        (source rank, source token).

        Parameters
        ----------
        x : Tensor [T, H], or (rows [T, H], scales [T, n])
            A row must be a multiple of 16 bytes. FP8 rows with one float32 scale per 128 elements, or with packed
            int32 scales, are sent as FP8. Other dtypes and scales are sent as bytes. T may differ between ranks and
            may be 0.
        handle : DispatchHandle, optional
            Handle of an earlier dispatch, whose plan is reused. The layout, ids and weights must be None.
        num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert : Tensor
            The result of get_dispatch_layout for topk_idx. num_tokens_per_rdma_rank is ignored.
        topk_idx : Tensor [T, K] int64 or int32, optional
            None: is_token_in_rank defines the routing, and no ids are received.
        topk_weights : Tensor [T, K] float32, optional
        expert_alignment : int
            The received tokens per expert in the list are rounded up to a multiple of it. Rows are not padded.
        num_worst_tokens : int
            Static number of received rows. Rows after the real ones are zero, with ids -1. 0: as many as arrive.
        config : Config, optional
            Checked, but without effect.
        previous_event : EventOverlap, optional
            The call waits for it first.
        async_finish, allocate_on_comm_stream : bool
            async_finish makes the last result an event. The call then returns when the counts are known, and the
            results may be read after the event. Otherwise it runs on the current stream.

        Returns
        -------
        (recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, event)
            recv_topk_idx int64 [N, K] has local ids, and -1 for experts of other ranks. The list is [] with
            num_worst_tokens. With a handle: (recv_x, None, None, None, None, event).

        Raises
        ------
        InvalidArgument
            An argument is wrong. Raised on all ranks.
        ConfigMismatch
            Ranks make different calls or pass different shapes.
        CapacityExceeded
            There are more rows than num_worst_tokens. Raised on all ranks.
        PeerLost, PeerTimeout
            A peer has died or stalled.
        """
        op = "dispatch"
        self._require_usable(op)
        if handle is not None:
            return self._dispatch_again(
                x,
                handle,
                config,
                (topk_idx, topk_weights),
                num_worst_tokens,
                previous_event,
                async_finish,
                allocate_on_comm_stream,
            )
        refusal, same, tokens = None, {}, 0
        try:
            self._check_config(op, config, "get_dispatch_config")
            wait_before(op, previous_event, async_finish, allocate_on_comm_stream, _NAMES)
            payload, ids, weights, counts = check_dispatch(
                self.world,
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
        except Exception as error:  # noqa: BLE001 - agree() raises it here, and InvalidArgument on the peers
            refusal = error
        most = (
            tokens
            if capturing() and refusal is None
            else self.world.agree(op, same=same, most=(tokens,), refusal=refusal)[0]
        )
        if topk_idx is None:  # send the caller's counts per expert to the owners
            counts = self.world.scatter(counts.view(self.group_size, -1)).sum(0)
        with torch.no_grad():
            routing = Routing(
                self.world,
                ids,
                experts,
                most,
                Buffer.num_sms,
                dict(layout="rank", capacity=num_worst_tokens or None),
            )
            early = async_finish and payload.arrives_in_place
            out = routing.dispatch(payload.hidden, payload.dtype, payload.x, weights, early)
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
            event_of(async_finish, x, ids, weights, arrival=routing.arrival),
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
        """Send the experts' rows back and sum them, without weights. Collective.

        Parameters
        ----------
        x : Tensor [N, H] of bfloat16, float16, float32 or float64
            One row per received row. H and dtype may differ from those of dispatch; the first such combine of a
            handle then costs one more dispatch.
        handle : DispatchHandle
            Handle of the dispatch. It may be combined any number of times.
        topk_weights : Tensor [N, K] float32, optional
            Summed over all rows of a token, not only over those of the owner of the pick: ones give the number of
            rows. This costs a small combine per call and, the first time for a handle, a small dispatch.
        bias : Tensor [T, H], or a pair of them, optional
            Added in FP32 before the sum is rounded.
        config, previous_event, async_finish, allocate_on_comm_stream
            As for dispatch.

        Returns
        -------
        (combined_x, combined_topk_weights, event)
            [T, H] of x's dtype, float32 [T, K] or None, EventOverlap.

        Raises
        ------
        InvalidArgument
            An argument is wrong. Raised on all ranks.
        PeerLost, PeerTimeout
            As dispatch.
        """
        op = "combine"
        self._require_usable(op)
        with Reporting(self.world, op) as reporting:
            routing = routing_of(op, handle, self.world)
            reporting.at(*routing.first)
            self._check_config(op, config, "get_combine_config")
            wait_before(op, previous_event, async_finish, allocate_on_comm_stream, _NAMES)
            rows = check_rows(op, x, routing.num_rows, self.rank)
            shape, kinds = (routing.num_rows, None), (torch.float32,)
            numbers = require_tensor(
                op, "topk_weights", topk_weights, optional=True, dtypes=kinds, shape=shape
            )
            bias = sum_of_biases(op, bias, (routing.tokens, rows.shape[1]), self.rank)
        with torch.no_grad():
            y, summed = routing.combine_with(rows, numbers, bias)
        return y, summed, event_of(async_finish, x, topk_weights)

    # -- the rest ---------------------------------------------------------------------------------

    def get_comm_stream(self):
        """Return the stream on which calls run: the current stream, or None on the CPU."""
        return (
            torch.cuda.current_stream(self.world.comm.device)
            if self.world.comm.device.type == "cuda"
            else None
        )

    def get_local_buffer_tensor(self, dtype, size=None, offset=0, use_rdma_buffer=False):
        """Not supported: a Buffer of moecomm has no raw bytes.

        Raises
        ------
        Unsupported
            Always.
        """
        raise Unsupported(
            "get_local_buffer_tensor: the windows of moecomm have no raw bytes for the caller; "
            "use torch.empty for scratch memory",
            op="get_local_buffer_tensor",
            rank=self.rank,
        )

    def destroy(self):
        """End this Buffer. Other Buffers of the group can still use its handles. Needs explicitly_destroy=True."""
        if not self.explicitly_destroy:
            refuse(
                "destroy",
                "the Buffer was made with explicitly_destroy=False; expected Buffer(..., explicitly_destroy=True)",
                self.rank,
            )
        self.destroyed = True

    def _require_usable(self, op):
        if self.destroyed:
            refuse(op, "the Buffer was destroyed; make a new one", self.rank)
        self.world.require_open(op)

    def _check_config(self, op, config, default):
        config = getattr(self, default)(self.group_size) if config is None else config
        if not isinstance(config, Config):
            refuse(op, f"config is a {type(config).__qualname__}; expected a Config", self.rank)

    def _dispatch_again(
        self, x, handle, config, left_out, worst, previous_event, async_finish, allocate_on_comm_stream
    ):
        op = "dispatch"
        with Reporting(self.world, op) as reporting:
            routing = routing_of(op, handle, self.world)
            reporting.at(*routing.first)
            self._check_config(op, config, "get_dispatch_config")
            wait_before(op, previous_event, async_finish, allocate_on_comm_stream, _NAMES)
            payload = Payload(op, x)
            if any(value is not None for value in left_out):
                refuse(
                    op,
                    "topk_idx or topk_weights are given; expected None, because a handle is given",
                    self.rank,
                )
            if worst and worst != routing.how["capacity"]:
                refuse(
                    op,
                    f"num_worst_tokens is {worst}; expected 0, or {routing.how['capacity'] or 0} as in the handle",
                    self.rank,
                )
            if payload.tokens != routing.tokens:
                refuse(
                    op,
                    f"x has {payload.tokens} tokens; expected {routing.tokens} as in the handle",
                    self.rank,
                )
        with torch.no_grad():
            early = async_finish and payload.arrives_in_place
            recv_x = payload.received(routing.dispatch(payload.hidden, payload.dtype, payload.x, None, early))
        return recv_x, None, None, None, None, event_of(async_finish, x, arrival=routing.arrival)


def _default_config(op, num_ranks):
    check_int(op, "num_ranks", num_ranks, 1)
    return Config(Buffer.num_sms)
