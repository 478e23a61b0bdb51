"""ElasticBuffer: deep_ep's second interface (2.x)."""

from __future__ import annotations

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
from ._sizes import bytes_for, multiprocessors_for
from ._world import world_of
from .domains import get_logical_domain_size, get_physical_domain_size  # noqa: F401 - deep_ep has them here
from .errors import Unsupported, refuse, require_tensor
from .events import EventHandle, event_of
from .handles import EPHandle


class ElasticBuffer:
    """Expert-parallel dispatch and combine by deep_ep 2.x' names, over moecomm. Construction is collective.

    Memory is not made here: it follows the shapes of the calls, is shared by all buffers of one group in a
    process, and grows.

    Parameters
    ----------
    group : torch ProcessGroup, one-dimensional DeviceMesh, mpi4py Comm or moecomm.Communicator
    num_bytes : int, optional
        Kept; None: get_buffer_size_hint for num_max_tokens_per_rank and hidden, which must be given then.
    num_cpu_bytes : int
        Of Engram, which is not here; 0.
    num_max_tokens_per_rank : int
        What dispatch takes where it gets none; the same on all ranks. 0: each call says it, or waits for
        the counts of its peers.
    hidden, num_topk, use_fp8_dispatch
        For the size hint.
    deterministic : bool
        Results are deterministic in any case.
    allow_hybrid_mode : bool
        False: num_scaleout_ranks says 1. Rows cross between nodes once per node in any case.
    allow_multiple_reduction, prefer_overlap_with_compute, sl_idx, num_allocated_qps
        Without meaning here.
    num_cpu_timeout_secs, num_gpu_timeout_secs
        Checked; the deadline is the communicator's (moecomm.integrations.deep_ep.configure).
    explicitly_destroy : bool
        destroy() may be called.

    Raises
    ------
    InvalidArgument
    Unsupported
        num_cpu_bytes is not 0.
    """

    def __init__(
        self,
        group,
        num_bytes=None,
        num_cpu_bytes=0,
        num_max_tokens_per_rank=0,
        hidden=0,
        num_topk=0,
        use_fp8_dispatch=False,
        deterministic=False,
        allow_hybrid_mode=True,
        allow_multiple_reduction=True,
        prefer_overlap_with_compute=True,
        sl_idx=3,
        num_allocated_qps=0,
        num_cpu_timeout_secs=300,
        num_gpu_timeout_secs=100,
        explicitly_destroy=False,
    ):
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
                f"{op}: num_cpu_bytes is {num_cpu_bytes}; Engram's host memory is not part of this library, expected 0",
                op=op,
            )
        if num_bytes is None:
            if not num_max_tokens_per_rank or not hidden:
                refuse(
                    op,
                    f"num_bytes is None, num_max_tokens_per_rank {num_max_tokens_per_rank} and hidden "
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
        self.group, self._world = group, world_of(group)
        self.num_bytes, self.num_allocated_qps = num_bytes, num_allocated_qps
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.rank_idx, self.num_ranks = self._world.rank, self._world.size
        self.explicitly_destroy = bool(explicitly_destroy)
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self._hybrid, self._destroyed = bool(allow_hybrid_mode), False
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()

    # -- statics and sizes ------------------------------------------------------------------------

    @staticmethod
    def get_buffer_size_hint(
        group,
        num_max_tokens_per_rank,
        hidden,
        num_topk=0,
        use_fp8_dispatch=False,
        allow_hybrid_mode=True,
        allow_multiple_reduction=True,
    ):
        """Bytes to pass as num_bytes, a multiple of 2 MiB: about what one dispatch and combine of this shape take.

        Local.
        """
        op = "get_buffer_size_hint"
        for name, value in {"num_max_tokens_per_rank": num_max_tokens_per_rank, "hidden": hidden}.items():
            check_int(op, name, value, 1)
        check_int(op, "num_topk", num_topk, 0)
        return bytes_for(group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch)

    @staticmethod
    def capture():
        """An EventHandle of the current stream's work so far."""
        return EventHandle()

    def get_physical_domain_size(self):
        """(nodes, ranks per node)."""
        return self._world.num_nodes, self._world.size // self._world.num_nodes

    def get_logical_domain_size(self):
        """(nodes, ranks per node); (1, ranks) without allow_hybrid_mode."""
        return self.get_physical_domain_size() if self._hybrid else (1, self._world.size)

    def get_theoretical_num_sms(
        self,
        num_experts,
        num_topk,
        num_scaleout_topk=0,
        rdma_gbs=0,
        nvlink_gbs=0,
        sm_read_gbs=200,
        sm_write_gbs=50,
    ):
        """Multiprocessors that keep the slowest link busy: even, at least 2, at most 64. 0 for a link: 50
        and 160 GB/s.
        """
        check_experts("get_theoretical_num_sms", num_experts, self.num_ranks, self.rank_idx)
        check_int("get_theoretical_num_sms", "num_topk", num_topk, 1, self.rank_idx)
        return multiprocessors_for(
            *self.get_physical_domain_size(),
            num_experts,
            num_topk,
            num_scaleout_topk,
            links=(rdma_gbs, nvlink_gbs, sm_read_gbs, sm_write_gbs),
        )

    def get_theoretical_num_qps(self, num_sms):
        """Queue pairs that deep_ep would use for that many multiprocessors; moecomm chooses its own."""
        check_int("get_theoretical_num_qps", "num_sms", num_sms, 1, self.rank_idx)
        return 16 * num_sms + 1 if self.num_scaleout_ranks > 1 else min(num_sms, 9)

    # -- dispatch and combine ---------------------------------------------------------------------

    def dispatch(
        self,
        x,
        topk_idx=None,
        topk_weights=None,
        cumulative_local_expert_recv_stats=None,
        num_experts=None,
        num_max_tokens_per_rank=None,
        expert_alignment=None,
        num_sms=0,
        num_qps=0,
        previous_event=None,
        previous_event_before_epilogue=None,
        async_with_compute_stream=False,
        allocate_on_comm_stream=False,
        handle=None,
        do_handle_copy=True,
        do_cpu_sync=None,
        do_expand=False,
        do_zero_padding=False,
        use_tma_aligned_col_major_sf=False,
    ):
        """Carry every token to the ranks that own its experts. Collective.

        With do_cpu_sync a new plan costs one small exchange more than moecomm.Buffer.dispatch, in which
        ranks learn of a peer that refuses its arguments. Rows are in order (source rank, source token),
        behind (local expert) when expanded.

        Parameters
        ----------
        x : Tensor [T, H], or (rows [T, H], scales [T, n])
            As for Buffer.dispatch; scales of any format of 4 bytes, say.
        topk_idx : Tensor [T, K] int64 or int32
            Left out with a handle.
        topk_weights : Tensor [T, K] float32, optional
        cumulative_local_expert_recv_stats : Tensor int32 [local experts], optional
            The counts are added to it.
        num_experts : int
            Needed without a handle.
        num_max_tokens_per_rank : int, optional
            The same on all ranks, not smaller than any T; None: the buffer's.
        expert_alignment : int, optional
            Expanded: every expert's rows are padded to a multiple with zeros. Plain: numbers in the
            handle's list are rounded up.
        num_sms : int
            Kept in the handle; 0: 20.
        num_qps, do_handle_copy
            Without effect: a handle's memory is its own.
        previous_event, previous_event_before_epilogue : EventHandle, optional
            Waited for first; previous_event needs allocate_on_comm_stream, as in deep_ep.
        async_with_compute_stream, allocate_on_comm_stream : bool
            async_with_compute_stream: the last result has an event. The call runs on the current stream in any case.
        handle : EPHandle, optional
            Its plan is used again.
        do_cpu_sync : bool, optional
            False: static shapes and nothing that the host waits for; None: True, and False with a handle.
        do_expand : bool
            One row per token and local expert, grouped by expert.
        do_zero_padding : bool
            Padding rows are zero in any case. Needs do_expand.
        use_tma_aligned_col_major_sf : bool
            Received scales are column-major, a column starting on 16 bytes.

        Returns
        -------
        (recv_x, recv_topk_idx, recv_topk_weights, handle, event)
            recv_topk_idx int64 [N, K] local ids, -1 elsewhere (None when expanded or by a handle);
            recv_topk_weights [N, K], or [N] when expanded. Without do_cpu_sync N is ranks *
            num_max_tokens_per_rank, or its worst case when expanded, and rows behind the real ones are zero.

        Raises
        ------
        InvalidArgument
            With do_cpu_sync and without a handle on every rank, else here alone.
        ConfigMismatch, CapacityExceeded, PeerLost, PeerTimeout
            As Buffer.dispatch.
        """
        op = "dispatch"
        self._require_usable(op)
        sync = handle is None if do_cpu_sync is None else bool(do_cpu_sync)
        most = self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
        stats = cumulative_local_expert_recv_stats
        refusal, same, routing = None, {}, None
        try:
            wait_for_events(
                op, self.rank_idx, previous_event, previous_event_before_epilogue, allocate_on_comm_stream
            )
            expanded = do_expand or (handle is not None and handle.do_expand)
            if do_zero_padding and not expanded:
                why = "do_zero_padding is set without do_expand; expected both, since only expanded rows have padding"
                refuse(op, why, self.rank_idx)
            check_ints(op, self.rank_idx, num_sms=num_sms, num_qps=num_qps, num_max_tokens_per_rank=most)
            payload = Payload(op, x)
            if most and payload.tokens > most:
                why = f"x has {payload.tokens} tokens; expected at most num_max_tokens_per_rank = {most}"
                refuse(op, why, self.rank_idx)
            if handle is not None:
                given = topk_idx, topk_weights, num_experts, expert_alignment, do_expand
                routing, weights = check_again(op, self._world, payload, handle, *given)
                alignment, do_expand = handle.expert_alignment, handle.do_expand
            else:
                alignment = 1 if expert_alignment is None else expert_alignment
                given = topk_idx, topk_weights, num_experts, alignment, most, do_expand, sync
                ids, weights, same = check_new(op, self._world, payload, *given)
            if stats is not None:
                shape = ((num_experts or routing.experts) // self.num_ranks,)
                name = "cumulative_local_expert_recv_stats"
                require_tensor(op, name, stats, dtypes=(torch.int32,), shape=shape)
        except Exception as error:  # noqa: BLE001 - agree raises it, here and as InvalidArgument on the peers
            refusal = error
        if (handle is not None and refusal is not None) or (not sync and refusal is not None):
            raise refusal
        if handle is None and sync and not (capturing() and most):
            largest = self._world.agree(
                op, same=same, most=(0 if refusal else payload.tokens,), refusal=refusal
            )[0]
            most = most or largest
        with torch.no_grad():
            if handle is None:
                routing = new_routing(self._world, ids, num_experts, most, alignment, do_expand, sync)
            out = routing.dispatch(payload.hidden, payload.dtype, payload.x, weights)
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
            event_of(async_with_compute_stream, x, topk_idx, topk_weights),
        )

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        num_sms=0,
        num_qps=0,
        previous_event=None,
        previous_event_before_epilogue=None,
        async_with_compute_stream=False,
        allocate_on_comm_stream=False,
    ):
        """Carry the experts' rows back and sum them, without weights. Collective.

        Parameters
        ----------
        x : Tensor [N, H] of bfloat16, float16, float32 or float64
            As many rows as the dispatch has given.
        handle : EPHandle
        topk_weights : Tensor float32, optional
            [N, K] of plain rows: summed over all rows of a token. [N] of expanded ones: each goes back to its pick.
        bias : Tensor [T, H], or a pair of them, optional
        num_sms, num_qps
            Without effect.
        previous_event, previous_event_before_epilogue, async_with_compute_stream, allocate_on_comm_stream
            As for dispatch.

        Returns
        -------
        (combined_x, combined_topk_weights, event)
            [T, H], float32 [T, K] or None, EventOverlap.

        Raises
        ------
        InvalidArgument
            Here alone.
        PeerLost, PeerTimeout
        """
        op = "combine"
        self._require_usable(op)
        wait_for_events(
            op, self.rank_idx, previous_event, previous_event_before_epilogue, allocate_on_comm_stream
        )
        check_ints(op, self.rank_idx, num_sms=num_sms, num_qps=num_qps)
        routing = routing_of(op, handle, self._world)
        rows = check_rows(op, x, routing.num_rows, self.rank_idx)
        shape = (routing.num_rows,) if handle.do_expand else (routing.num_rows, None)
        weights = require_tensor(
            op, "topk_weights", topk_weights, optional=True, dtypes=(torch.float32,), shape=shape
        )
        bias = sum_of_biases(op, bias, (routing.tokens, rows.shape[1]), self.rank_idx)
        summed = None
        with torch.no_grad():
            if weights is not None and handle.do_expand:
                core, plan = routing.plan(rows.shape[1], rows.dtype)
                y, summed = ops.combine_slots(
                    rows, weights, plan.tensor(), core.number, "expert", routing.tokens
                )
                y = y if bias is None else routing.combine(rows, bias)
            else:
                y = routing.combine(rows, bias)
                summed = None if weights is None else routing.combine_numbers(weights)
        return y, summed, event_of(async_with_compute_stream, x, topk_weights)

    # -- the rest ---------------------------------------------------------------------------------

    def barrier(self, use_comm_stream=True, with_cpu_sync=False, sequential=True):
        """Wait on the host until every rank has come here."""
        self._require_usable("barrier")
        if self._world.comm.device.type == "cuda":
            torch.cuda.current_stream(self._world.comm.device).synchronize()
        self._world.comm.barrier()

    def get_comm_stream(self):
        """The stream that calls run on: the current one. None on the CPU, which has no streams."""
        return (
            torch.cuda.current_stream(self._world.comm.device)
            if self._world.comm.device.type == "cuda"
            else None
        )

    def destroy(self):
        """End this buffer. Needs explicitly_destroy=True."""
        if not self.explicitly_destroy:
            refuse(
                "destroy",
                "the buffer was made with explicitly_destroy=False; expected ElasticBuffer(..., "
                "explicitly_destroy=True)",
                self.rank_idx,
            )
        self._destroyed = True

    def _require_usable(self, op):
        if self._destroyed:
            refuse(op, "the buffer was destroyed; expected a new one", self.rank_idx)
        self._world.require_open(op)


for _name, _why in UNSUPPORTED.items():
    setattr(ElasticBuffer, _name, unsupported(_name, _why))
