"""ElasticBuffer: deep_ep's second interface (2.x)."""

from __future__ import annotations

from typing import Any

import torch

from ... import ops
from ._checks import capturing, check_experts, check_int, check_ints, check_rows, sum_of_biases
from ._elastic import (
    UNSUPPORTED,
    by_column,
    check_again,
    check_new,
    new_routing,
    routing_of,
    unsupported,
    wait_for_events,
)
from ._routing import Payload
from ._reporting import Reporting
from ._sizes import bytes_for, multiprocessors_for
from ._world import world_of
from .domains import get_logical_domain_size, get_physical_domain_size  # noqa: F401 - imported from here by callers
from .errors import Unsupported, refuse, require_tensor
from .events import EventHandle, event_of
from .handles import EPHandle


class ElasticBuffer:
    """Expert-parallel dispatch and combine with deep_ep 2.x's interface, over moecomm. Construction is collective.

    The constructor reserves no memory. The first call of a shape does. All buffers of one group in a process share
    the memory, and it grows.

    Parameters
    ----------
    group : torch ProcessGroup, one-dimensional DeviceMesh, mpi4py Comm or moecomm.Communicator
        The ranks.
    num_bytes : int, optional
        Stored as an attribute. Default: get_buffer_size_hint(), which needs num_max_tokens_per_rank and hidden.
    num_cpu_bytes : int
        Must be 0: Engram is not supported.
    num_max_tokens_per_rank : int
        Default of dispatch; equal on all ranks. 0: each call has its own number, or exchanges the counts.
    hidden, num_topk, use_fp8_dispatch
        For get_buffer_size_hint().
    deterministic : bool
        Ignored: results are always deterministic.
    allow_hybrid_mode : bool
        False: num_scaleout_ranks is 1. A token crosses to a node at most once in any case.
    allow_multiple_reduction, prefer_overlap_with_compute, sl_idx, num_allocated_qps
        Ignored.
    num_cpu_timeout_secs, num_gpu_timeout_secs
        Checked, but without effect: the timeout is set by moecomm.integrations.deep_ep.configure.
    explicitly_destroy : bool
        Allow destroy().

    Raises
    ------
    InvalidArgument
        An argument is wrong.
    Unsupported
        num_cpu_bytes is not 0.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: Any = None,
        num_cpu_bytes: Any = 0,
        num_max_tokens_per_rank: Any = 0,
        hidden: int = 0,
        num_topk: Any = 0,
        use_fp8_dispatch: Any = False,
        deterministic: Any = False,
        allow_hybrid_mode: Any = True,
        allow_multiple_reduction: Any = True,
        prefer_overlap_with_compute: Any = True,
        sl_idx: Any = 3,
        num_allocated_qps: Any = 0,
        num_cpu_timeout_secs: Any = 300,
        num_gpu_timeout_secs: Any = 100,
        explicitly_destroy: Any = False,
    ) -> None:
        op = "ElasticBuffer"
        if group is None:
            refuse(op, "group is None; expected a ProcessGroup")
        check_ints(
            op,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            hidden=hidden,
            num_topk=num_topk,
            num_allocated_qps=num_allocated_qps,
            num_cpu_bytes=num_cpu_bytes,
            sl_idx=sl_idx,
            num_bytes=num_bytes or 0,
        )
        check_int(op, "num_cpu_timeout_secs", num_cpu_timeout_secs, 1)
        check_int(op, "num_gpu_timeout_secs", num_gpu_timeout_secs, 1)
        if num_cpu_bytes:
            raise Unsupported(
                f"{op}: num_cpu_bytes is {num_cpu_bytes}; expected 0, because Engram is not supported",
                op=op,
            )
        if num_bytes is None:
            if not num_max_tokens_per_rank or not hidden:
                refuse(
                    op,
                    f"num_bytes is None, num_max_tokens_per_rank is {num_max_tokens_per_rank} and hidden is "
                    f"{hidden}; expected num_bytes, or both of the others",
                )
            num_bytes = self.get_buffer_size_hint(
                group,
                num_max_tokens_per_rank,
                hidden,
                num_topk,
                use_fp8_dispatch,
                allow_hybrid_mode,
                allow_multiple_reduction,
            )
        self.group, self.world = group, world_of(group)
        self.num_bytes, self.num_allocated_qps = num_bytes, num_allocated_qps
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.rank_idx, self.num_ranks = self.world.rank, self.world.size
        self.explicitly_destroy = bool(explicitly_destroy)
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self._hybrid, self.destroyed = bool(allow_hybrid_mode), False
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()

    # -- statics and sizes ------------------------------------------------------------------------

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: Any,
        hidden: int,
        num_topk: Any = 0,
        use_fp8_dispatch: Any = False,
        allow_hybrid_mode: Any = True,
        allow_multiple_reduction: Any = True,
    ) -> Any:
        """Return bytes for num_bytes: estimated memory of one dispatch and combine, a multiple of 2 MiB. Local."""
        op = "get_buffer_size_hint"
        for name, value in {"num_max_tokens_per_rank": num_max_tokens_per_rank, "hidden": hidden}.items():
            check_int(op, name, value, 1)
        check_int(op, "num_topk", num_topk, 0)
        return bytes_for(group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch)

    @staticmethod
    def capture() -> Any:
        """Return an EventHandle of all work that the current stream has so far."""
        return EventHandle()

    def get_physical_domain_size(self) -> Any:
        """Return (nodes, ranks per node)."""
        return self.world.num_nodes, self.world.size // self.world.num_nodes

    def get_logical_domain_size(self) -> Any:
        """Return (nodes, ranks per node), or (1, ranks) without allow_hybrid_mode."""
        return self.get_physical_domain_size() if self._hybrid else (1, self.world.size)

    def get_theoretical_num_sms(
        self,
        num_experts: Any,
        num_topk: Any,
        num_scaleout_topk: Any = 0,
        rdma_gbs: Any = 0,
        nvlink_gbs: Any = 0,
        sm_read_gbs: Any = 200,
        sm_write_gbs: Any = 50,
    ) -> Any:
        """Return the number of multiprocessors that saturates the slowest link: even, in 2..64.

        rdma_gbs 0 means 50 GB/s, nvlink_gbs 0 means 160 GB/s.
        """
        check_experts("get_theoretical_num_sms", num_experts, self.num_ranks, self.rank_idx)
        check_int("get_theoretical_num_sms", "num_topk", num_topk, 1, self.rank_idx)
        return multiprocessors_for(  # type: ignore[call-arg,misc]
            *self.get_physical_domain_size(),
            num_experts,
            num_topk,
            num_scaleout_topk,
            links=(rdma_gbs, nvlink_gbs, sm_read_gbs, sm_write_gbs),
        )

    def get_theoretical_num_qps(self, num_sms: int) -> Any:
        """Return the number of queue pairs that deep_ep would use for num_sms. moecomm chooses its own number."""
        check_int("get_theoretical_num_qps", "num_sms", num_sms, 1, self.rank_idx)
        return 16 * num_sms + 1 if self.num_scaleout_ranks > 1 else min(num_sms, 9)

    # -- dispatch and combine ---------------------------------------------------------------------

    def dispatch(
        self,
        x: Any,
        topk_idx: Any = None,
        topk_weights: Any = None,
        cumulative_local_expert_recv_stats: Any = None,
        num_experts: Any = None,
        num_max_tokens_per_rank: Any = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: Any = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: Any = False,
        allocate_on_comm_stream: Any = False,
        handle: Any = None,
        do_handle_copy: Any = True,
        do_cpu_sync: Any = None,
        do_expand: Any = False,
        do_zero_padding: Any = False,
        use_tma_aligned_col_major_sf: Any = False,
    ) -> Any:
        """Send every token to the ranks that own its experts. Collective.

        With do_cpu_sync and without a handle, ranks first learn whether a peer refuses its arguments. This costs one
        small exchange more than moecomm.Buffer.dispatch. Received rows are ordered by (source rank, source token);
        with do_expand by (local expert, source rank, source token).

        Parameters
        ----------
        x : Tensor [T, H], or (rows [T, H], scales [T, n])
            As for Buffer.dispatch.
        topk_idx : Tensor [T, K] int64 or int32
            None with a handle.
        topk_weights : Tensor [T, K] float32, optional
        cumulative_local_expert_recv_stats : Tensor int32 [local experts], optional
            The counts are added to it.
        num_experts : int
            Needed without a handle.
        num_max_tokens_per_rank : int, optional
            Equal on all ranks, and at least the largest T. Default: that of the buffer.
        expert_alignment : int, optional
            With do_expand, the rows of every expert are padded with zeros to a multiple of it. Otherwise the counts
            in the handle's list are rounded up.
        num_sms : int
            Stored in the handle. 0 means 20.
        num_qps, do_handle_copy
            Ignored.
        previous_event, previous_event_before_epilogue : EventHandle, optional
            The call waits for them first. previous_event needs allocate_on_comm_stream, as in deep_ep.
        async_with_compute_stream, allocate_on_comm_stream : bool
            async_with_compute_stream makes the last result an event. The call then returns when the counts are known,
            and the results may be read after the event. Otherwise it runs on the current stream.
        handle : EPHandle, optional
            Handle of an earlier dispatch, whose plan is reused.
        do_cpu_sync : bool, optional
            False: shapes are static, and the host does not wait. Default: True without a handle, False with one.
        do_expand : bool
            One row per token and local expert, grouped by expert.
        do_zero_padding : bool
            Needs do_expand. Padding rows are zero in any case.
        use_tma_aligned_col_major_sf : bool
            Received scales are column-major, and every column starts at a multiple of 16 bytes.

        Returns
        -------
        (recv_x, recv_topk_idx, recv_topk_weights, handle, event)
            recv_topk_idx int64 [N, K] has local ids, and -1 for experts of other ranks; it is None with do_expand or
            a handle. recv_topk_weights is [N, K], or [N] with do_expand. Without do_cpu_sync, N is ranks *
            num_max_tokens_per_rank (with do_expand, the worst case), and rows after the real ones are zero.

        Raises
        ------
        InvalidArgument
            An argument is wrong. Raised on all ranks.
        ConfigMismatch, CapacityExceeded, PeerLost, PeerTimeout
            As Buffer.dispatch.
        """
        op = "dispatch"
        self._require_usable(op)
        sync = handle is None if do_cpu_sync is None else bool(do_cpu_sync)
        most = self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
        stats = cumulative_local_expert_recv_stats
        refusal: BaseException | None = None
        same: Any = {}
        routing: Any = None
        try:
            wait_for_events(
                op, self.rank_idx, previous_event, previous_event_before_epilogue, allocate_on_comm_stream
            )
            expanded = do_expand or (handle is not None and handle.do_expand)
            if do_zero_padding and not expanded:
                why = "do_zero_padding is set; expected do_expand with it, because only expanded rows have padding"
                refuse(op, why, self.rank_idx)
            check_ints(op, self.rank_idx, num_sms=num_sms, num_qps=num_qps, num_max_tokens_per_rank=most)
            payload = Payload(op, x)
            if most and payload.tokens > most:
                why = f"x has {payload.tokens} tokens; expected at most num_max_tokens_per_rank = {most}"
                refuse(op, why, self.rank_idx)
            if handle is not None:
                given: tuple[Any, ...] = topk_idx, topk_weights, num_experts, expert_alignment, do_expand
                routing, weights = check_again(op, self.world, payload, handle, *given)
                alignment, do_expand = handle.expert_alignment, handle.do_expand
            else:
                alignment = 1 if expert_alignment is None else expert_alignment
                given = topk_idx, topk_weights, num_experts, alignment, most, do_expand, sync
                ids, weights, same = check_new(op, self.world, payload, *given)
            if stats is not None:
                shape = ((num_experts or routing.experts) // self.num_ranks,)
                name = "cumulative_local_expert_recv_stats"
                require_tensor(op, name, stats, dtypes=(torch.int32,), shape=shape)
        except Exception as error:  # noqa: BLE001 - agree() raises it here, and InvalidArgument on the peers
            refusal = error
        if refusal is not None and (handle is not None or not sync):
            with Reporting(self.world, op) as reporting:
                if isinstance(handle, EPHandle):
                    reporting.at(*routing_of(op, handle, self.world).first)
                raise refusal
        if handle is None and sync and not (capturing() and most):
            largest = self.world.agree(
                op, same=same, most=(0 if refusal else payload.tokens,), refusal=refusal
            )[0]
            most = most or largest
        with torch.no_grad():
            if handle is None:
                routing = new_routing(self.world, ids, num_experts, most, alignment, do_expand, sync)
            in_place = payload.arrives_in_place and not use_tma_aligned_col_major_sf
            early = async_with_compute_stream and in_place
            out = routing.dispatch(payload.hidden, payload.dtype, payload.x, weights, early)
            recv_x = payload.received(out)
            if use_tma_aligned_col_major_sf and isinstance(recv_x, tuple):
                recv_x = recv_x[0], by_column(recv_x[1])
            recv_ids = None if do_expand or handle is not None else out.topk_ids
            recv_weights = None if weights is None else out.topk_weights
            handle = handle or EPHandle(
                routing, out, self.num_scaleup_ranks, bool(do_expand), alignment, num_sms or 20, sync
            )
            if stats is not None:
                stats.add_(handle.num_unaligned_recv_tokens_per_expert)
        return (
            recv_x,
            recv_ids,
            recv_weights,
            handle,
            event_of(async_with_compute_stream, x, topk_idx, topk_weights, arrival=routing.arrival),
        )

    def combine(
        self,
        x: Any,
        handle: Any,
        topk_weights: Any = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: Any = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: Any = False,
        allocate_on_comm_stream: Any = False,
    ) -> Any:
        """Send the experts' rows back and sum them, without weights. Collective.

        Parameters
        ----------
        x : Tensor [N, H] of bfloat16, float16, float32 or float64
            One row per received row.
        handle : EPHandle
            Handle of the dispatch.
        topk_weights : Tensor float32, optional
            [N, K]: summed over all rows of a token. With do_expand, [N]: each returns to its pick.
        bias : Tensor [T, H], or a pair of them, optional
            Added in FP32 before the sum is rounded.
        num_sms, num_qps
            Ignored.
        previous_event, previous_event_before_epilogue, async_with_compute_stream, allocate_on_comm_stream
            As for dispatch.

        Returns
        -------
        (combined_x, combined_topk_weights, event)
            [T, H], float32 [T, K] or None, EventOverlap.

        Raises
        ------
        InvalidArgument
            An argument is wrong. Raised on all ranks.
        PeerLost, PeerTimeout
            As Buffer.dispatch.
        """
        op = "combine"
        self._require_usable(op)
        with Reporting(self.world, op) as reporting:
            routing = routing_of(op, handle, self.world)
            reporting.at(*routing.first)
            wait_for_events(
                op, self.rank_idx, previous_event, previous_event_before_epilogue, allocate_on_comm_stream
            )
            check_ints(op, self.rank_idx, num_sms=num_sms, num_qps=num_qps)
            rows = check_rows(op, x, routing.num_rows, self.rank_idx)
            shape = (routing.num_rows,) if handle.do_expand else (routing.num_rows, None)
            weights = require_tensor(
                op, "topk_weights", topk_weights, optional=True, dtypes=(torch.float32,), shape=shape
            )
            bias = sum_of_biases(op, bias, (routing.tokens, rows.shape[1]), self.rank_idx)
        with torch.no_grad():
            if weights is not None and handle.do_expand:
                core, plan = routing.plan(rows.shape[1], rows.dtype)
                y, summed = ops.combine_slots(
                    rows, weights, plan.tensor(), core.name, "expert", routing.tokens
                )
                y = y if bias is None else routing.combine(rows, bias)
            else:
                y, summed = routing.combine_with(rows, weights, bias)
        return y, summed, event_of(async_with_compute_stream, x, topk_weights)

    # -- the rest ---------------------------------------------------------------------------------

    def barrier(
        self, use_comm_stream: Any = True, with_cpu_sync: Any = False, sequential: Any = True
    ) -> None:
        """Wait on the host until all ranks have made this call."""
        self._require_usable("barrier")
        if self.world.comm.device.type == "cuda":
            torch.cuda.current_stream(self.world.comm.device).synchronize()
        self.world.comm.barrier()

    def get_comm_stream(self) -> Any:
        """Return the stream on which calls run: the current stream, or None on the CPU."""
        return (
            torch.cuda.current_stream(self.world.comm.device)
            if self.world.comm.device.type == "cuda"
            else None
        )

    def destroy(self) -> None:
        """End this buffer. Needs explicitly_destroy=True."""
        if not self.explicitly_destroy:
            refuse(
                "destroy",
                "the buffer was made with explicitly_destroy=False; expected ElasticBuffer(..., "
                "explicitly_destroy=True)",
                self.rank_idx,
            )
        self.destroyed = True

    def _require_usable(self, op: str) -> None:
        if self.destroyed:
            refuse(op, "the buffer was destroyed; make a new one", self.rank_idx)
        self.world.require_open(op)


for _name, _why in UNSUPPORTED.items():
    setattr(ElasticBuffer, _name, unsupported(_name, _why))
