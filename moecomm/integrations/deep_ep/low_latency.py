"""The low-latency verbs of deep_ep's Buffer, over moecomm's decode path."""

from __future__ import annotations

from typing import Any

import torch

from ...quant import unpack_ue8m0
from ._attributes import OfBuffer
from ._checks import IDS, check_experts, check_int
from ._reporting import Reporting
from .errors import Unsupported, refuse, require_tensor
from .events import event_of


class LowLatencyHandle:
    """Handle for low_latency_combine, in place of deep_ep's tuple.

    Items: (src_info, layout_range, max tokens, hidden, num_experts). The first two are opaque and cannot be read.
    """

    def __init__(
        self, buffer: Any, core: Any, handle: Any, ids: Any, max_tokens: int, num_experts: Any
    ) -> None:
        self.buffer, self.core, self.handle, self.ids = buffer, core, handle, ids
        self.numbers = max_tokens, core.hidden, num_experts
        self.hook: Any = None  # of the last combine
        self.next_rows = handle.rows  # what get_next_low_latency_combine_buffer returns

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int) or not -3 <= index <= 4 or 0 <= index < 2:
            raise Unsupported(
                "handle: items 0 and 1, src_info and layout_range, belong to deep_ep's kernels and do not exist here; "
                "read items 2, 3 and 4 only, and pass the handle to calls unchanged",
                op="handle",
            )
        return self.numbers[index - 2 if index >= 0 else index]


class LowLatency(OfBuffer):
    """Mixin of Buffer: low-latency dispatch and combine. Expects world, rank, group_size and _require_usable."""

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: Any, hidden: int, num_ranks: Any, num_experts: Any
    ) -> Any:
        """Return bytes for num_rdma_bytes: estimated memory of the low-latency verbs for this shape on each rank."""
        for name, value in {
            "num_max_dispatch_tokens_per_rank": num_max_dispatch_tokens_per_rank,
            "hidden": hidden,
            "num_ranks": num_ranks,
            "num_experts": num_experts,
        }.items():
            check_int("get_low_latency_rdma_size_hint", name, value, 1)
        # Each of the two epochs has messages, packed rows and the experts' output.
        rows = num_max_dispatch_tokens_per_rank * num_experts
        return -(-2 * rows * (3 * 2 * hidden + 4 * -(-hidden // 128) + 64) // 128) * 128

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: Any, hidden: int, num_experts: Any
    ) -> None:
        """Do nothing: normal mode and low-latency mode share no memory."""
        self._require_usable("clean_low_latency_buffer")

    def low_latency_dispatch(
        self,
        x: Any,
        topk_idx: Any,
        num_max_dispatch_tokens_per_rank: Any,
        num_experts: Any,
        cumulative_local_expert_recv_stats: Any = None,
        dispatch_wait_recv_cost_stats: Any = None,
        use_fp8: Any = True,
        round_scale: Any = False,
        use_ue8m0: Any = False,
        async_finish: Any = False,
        return_recv_hook: Any = False,
        *,
        topk_weights: Any = None,
        x_global_scale: Any = None,
        use_nvfp4: Any = False,
        use_ue8m0_for_sf: Any = False,
    ) -> Any:
        """Send every token to the ranks that own its experts, with low latency. Collective.

        The first call of a shape reserves its memory.

        Parameters
        ----------
        x : Tensor [T, hidden] bfloat16 (or float16, float32)
            T is at most num_max_dispatch_tokens_per_rank. It may differ between ranks and may be 0.
        topk_idx : Tensor [T, K] int64 or int32
            Global expert ids. -1: no expert.
        num_max_dispatch_tokens_per_rank, num_experts : int
            Equal on all ranks.
        cumulative_local_expert_recv_stats : Tensor int32 [local experts], optional
            The counts are added to it when they arrive.
        dispatch_wait_recv_cost_stats
            Unsupported: moecomm does not measure the waiting time per peer.
        use_fp8, round_scale, use_ue8m0 : bool
            Rows are received in FP8 with one scale per 128 elements. Scales are float32; with round_scale, powers of
            two in float32; with use_ue8m0, which needs round_scale, UE8M0 with four scales in an int32.
        async_finish, return_recv_hook : bool
            Return an event, or a hook that receives the results; nothing runs before the hook is called. Not both.
        topk_weights, x_global_scale, use_nvfp4, use_ue8m0_for_sf
            Parameters of the hybrid-ep branch. Unsupported.

        Returns
        -------
        (recv_x, recv_count, handle, event, hook)
            recv_x is [local experts, ranks * max, hidden]; with use_fp8 it is a pair with column-major scales [..,
            hidden/128], or int32 [.., hidden/512]. recv_count is int32 [local experts]. hook may be None. The second
            dispatch after this one overwrites the results.

        Raises
        ------
        InvalidArgument
            An argument is wrong. Raised on all ranks.
        Unsupported
            An unsupported parameter is given.
        PeerLost, PeerTimeout
            A peer has died or stalled.
        """
        op = "low_latency_dispatch"
        self._require_low_latency(op)
        with Reporting(self.world, "decode_dispatch"):
            self._require_absent(
                op,
                dispatch_wait_recv_cost_stats=dispatch_wait_recv_cost_stats,
                topk_weights=topk_weights,
                x_global_scale=x_global_scale,
                use_nvfp4=use_nvfp4 or None,
                use_ue8m0_for_sf=use_ue8m0_for_sf or None,
            )
            _require_one(op, async_finish, return_recv_hook)
            if (use_ue8m0 and not (round_scale and use_fp8)) or (round_scale and not use_fp8):
                refuse(
                    op,
                    f"use_fp8 is {use_fp8}, round_scale is {round_scale} and use_ue8m0 is {use_ue8m0}; expected "
                    "round_scale only with use_fp8, and use_ue8m0 only with both",
                    self.rank,
                )
            x = require_tensor(
                op, "x", x, dtypes=(torch.bfloat16, torch.float16, torch.float32), shape=(None, None)
            )
            most = num_max_dispatch_tokens_per_rank
            if (
                isinstance(most, bool)
                or not isinstance(most, int)
                or not 1 <= most <= 1 << 20
                or len(x) > most
            ):
                refuse(
                    op,
                    f"num_max_dispatch_tokens_per_rank is {most!r}; expected an int of at least {max(1, len(x))}, the "
                    "tokens of x",
                    self.rank,
                )
            check_experts(op, num_experts, self.group_size, self.rank)
            ids = require_tensor(op, "topk_idx", topk_idx, dtypes=IDS, shape=(len(x), None))
            local = num_experts // self.group_size
            stats = cumulative_local_expert_recv_stats
            if (
                stats is not None
                and require_tensor(
                    op, "cumulative_local_expert_recv_stats", stats, dtypes=(torch.int32,), shape=(local,)
                )
                is None
            ):
                stats = None
        core = self.world.core(
            x.shape[1], num_experts, ids.shape[1], x.dtype, most, decode=True, num_sms=type(self).num_sms
        )
        self.world.last[True] = core
        with torch.no_grad():
            received, wait = core.decode_dispatch(
                x,
                ids,
                quant=("fp8_ue8m0" if round_scale else "fp8") if use_fp8 else None,
                scale_layout="column" if use_fp8 else "row",
            )
            count, scales = torch.empty(local, dtype=torch.int32, device=x.device), received.scales
            if round_scale and not use_ue8m0:  # unpacked to float32 by the hook
                words = -(-x.shape[1] // 128)
                scales = torch.empty(
                    (local, words, received.x.shape[1]), dtype=torch.float32, device=x.device
                ).transpose(1, 2)
        done: list[Any] = []

        def hook() -> None:
            if done:
                return
            done.append(True)
            wait()
            with torch.no_grad():
                count.copy_(received.counts)
                if scales is not received.scales:
                    flat = received.scales.reshape(-1, received.scales.shape[2])
                    scales.copy_(unpack_ue8m0(flat, scales.shape[2]).view(scales.shape))
                if stats is not None:
                    stats.add_(count)

        if not return_recv_hook:
            hook()
        handle = LowLatencyHandle(self, core, received.handle, ids, most, num_experts)
        return (
            (received.x, scales) if use_fp8 else received.x,
            count,
            handle,
            event_of(async_finish, x, topk_idx),
            hook if return_recv_hook else None,
        )

    def low_latency_combine(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        handle: Any,
        use_logfmt: Any = False,
        zero_copy: Any = False,
        async_finish: Any = False,
        return_recv_hook: Any = False,
        out: Any = None,
        combine_wait_recv_cost_stats: Any = None,
        *,
        overlap: Any = False,
        src_signals: Any = None,
        src_signal_expect_value: Any = 0,
        packed_recv_count: Any = None,
        comp_signal: Any = None,
        block_m: Any = 64,
        threshold: Any = 0,
        num_sms: int = 3,
    ) -> Any:
        """Send the experts' rows back and compute their weighted sum. Collective.

        Parameters
        ----------
        x : Tensor [local experts, ranks * max, hidden] of dispatch's dtype
            Must not change until the hook has been called.
        topk_idx : Tensor [T, K]
            As given to low_latency_dispatch.
        topk_weights : Tensor [T, K] float32
        handle : LowLatencyHandle
            Handle of the dispatch. It may be combined any number of times. A further combine first calls the hook of
            the one before, and waits until the peers have received it.
        use_logfmt : bool
            Send rows between nodes in LogFMT-10. Inside a node they are not encoded.
        zero_copy : bool
            Send the contents of get_next_low_latency_combine_buffer(handle), and ignore x.
        async_finish, return_recv_hook : bool
            As for low_latency_dispatch.
        out : Tensor [T, hidden], optional
            Receives the result.
        combine_wait_recv_cost_stats
            Unsupported, as in low_latency_dispatch.
        overlap, src_signals, src_signal_expect_value, packed_recv_count, comp_signal, block_m, threshold, num_sms
            Parameters of branches that overlap the down-projection with combine. Unsupported.

        Returns
        -------
        (combined_x [T, hidden], event, hook or None)

        Raises
        ------
        InvalidArgument
            An argument is wrong. Raised on all ranks.
        Unsupported, PeerLost, PeerTimeout
            As low_latency_dispatch.
        """
        op = "low_latency_combine"
        self._require_low_latency(op)
        with Reporting(self.world, "decode_combine") as reporting:
            self._check_ll_handle(op, handle)
            core, used = handle.core, handle.handle
            reporting.at(core, used)
            self._require_absent(
                op,
                combine_wait_recv_cost_stats=combine_wait_recv_cost_stats,
                overlap=overlap or None,
                src_signals=src_signals,
                packed_recv_count=packed_recv_count,
                comp_signal=comp_signal,
            )
            _require_one(op, async_finish, return_recv_hook)
            rows = require_tensor(
                op,
                "x",
                handle.next_rows if zero_copy else x,
                dtypes=(core.dtype,),
                shape=tuple(used.rows.shape),
            )
            ids = require_tensor(op, "topk_idx", topk_idx, dtypes=IDS, shape=tuple(handle.ids.shape))
            weights = require_tensor(
                op, "topk_weights", topk_weights, dtypes=(torch.float32,), shape=tuple(handle.ids.shape)
            )
        with torch.no_grad():
            if handle.hook is not None:
                handle.hook()
            y, wait = core.decode_combine(
                rows,
                ids,
                weights,
                used,
                wire="logfmt10" if use_logfmt else None,
                return_hook=return_recv_hook,
                out=out,
            )
        done: list[Any] = []

        def hook() -> None:
            if wait is not None and not done:
                done.append(True)
                wait()

        handle.hook = hook
        return y, event_of(async_finish, x, topk_idx, topk_weights), hook if return_recv_hook else None

    def get_next_low_latency_combine_buffer(self, handle: Any) -> Any:
        """Return memory for the experts' output, [local experts, ranks * max, hidden].

        low_latency_combine(zero_copy=True) sends it, without a copy in the first combine of the handle. Peers read this
        memory from then on, so later calls return other memory.
        """
        self._require_low_latency("get_next_low_latency_combine_buffer")
        self._check_ll_handle("get_next_low_latency_combine_buffer", handle)
        if handle.hook is not None and handle.next_rows is handle.handle.rows:
            handle.next_rows = torch.empty_like(handle.handle.rows)
        return handle.next_rows

    # -- rank masks -------------------------------------------------------------------------------

    def low_latency_update_mask_buffer(self, rank_to_mask: Any, mask: Any = False) -> None:
        """Mask a dead rank: the low-latency verbs go on without it. Collective over the ranks that are left.

        Picks of its experts count as -1 from the next low_latency_dispatch on. The Buffer's memory and captured CUDA
        graphs stay. With mask=False nothing happens, since a masked rank cannot return.

        Raises
        ------
        InvalidArgument
            rank_to_mask is not another rank, or may live. There was no low_latency_dispatch. Ranks reach each other
            over UCX or NCCL.
        Unsupported
            The rank is masked and mask is False.
        PeerLost, PeerTimeout
            A rank that is left does not come.
        """
        op = "low_latency_update_mask_buffer"
        self._require_masks(op)
        if (
            isinstance(rank_to_mask, bool)
            or not isinstance(rank_to_mask, int)
            or not 0 <= rank_to_mask < self.group_size
        ):
            refuse(
                op,
                f"rank_to_mask is {rank_to_mask!r}; expected a rank in 0..{self.group_size - 1}",
                self.rank,
            )
        if mask:
            self.world.mask(op, rank_to_mask)
        elif rank_to_mask in self.world.masked:
            self._refuse_return(op, rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: Any) -> None:
        """Fill mask_status, int32 [ranks]: 1 for masked ranks, else 0."""
        self._require_masks("low_latency_query_mask_buffer")
        require_tensor(
            "low_latency_query_mask_buffer",
            "mask_status",
            mask_status,
            dtypes=(torch.int32,),
            shape=(self.group_size,),
        )
        mask_status.zero_()
        for rank in self.world.masked:
            mask_status[rank] = 1

    def low_latency_clean_mask_buffer(self) -> None:
        """Do nothing if no rank is masked.

        Raises
        ------
        Unsupported
            A rank is masked: it cannot return.
        """
        op = "low_latency_clean_mask_buffer"
        self._require_masks(op)
        if self.world.masked:
            self._refuse_return(op, self.world.masked[0])

    def _refuse_return(self, op: str, rank: int) -> None:
        raise Unsupported(
            f"{op}: rank {rank} is masked and cannot return; expected a new Buffer for a group of the ranks that are "
            "there (moecomm.Communicator.join, shrink)",
            op=op,
            rank=self.rank,
            peer=rank,
        )

    def _require_masks(self, op: str) -> None:
        self._require_usable(op)
        if not self.enable_shrink:
            refuse(
                op,
                "the Buffer was made with enable_shrink=False; expected Buffer(..., low_latency_mode=True, "
                "enable_shrink=True)",
                self.rank,
            )

    def _require_low_latency(self, op: str) -> None:
        self._require_usable(op)
        if not self.low_latency_mode:
            refuse(
                op,
                "the Buffer was made with low_latency_mode=False; expected Buffer(..., low_latency_mode=True)",
                self.rank,
            )

    def _require_absent(self, op: str, **values: Any) -> None:
        for name, value in values.items():
            if value is not None:
                raise Unsupported(
                    f"{op}: {name} is given; expected its default, because this drop-in does not support it "
                    "(docs/deep_ep.md says why)",
                    op=op,
                    rank=self.rank,
                )

    def _check_ll_handle(self, op: str, handle: Any) -> None:
        if not isinstance(handle, LowLatencyHandle) or handle.buffer.world is not self.world:
            refuse(
                op,
                f"handle is a {type(handle).__qualname__}; expected the handle of a low_latency_dispatch of this group",
                self.rank,
            )


def _require_one(op: str, async_finish: Any, return_recv_hook: Any) -> None:
    if async_finish and return_recv_hook:
        refuse(op, "async_finish and return_recv_hook are both set; expected at most one of them")
