"""The low-latency verbs of deep_ep's Buffer, over moecomm's decode path."""

from __future__ import annotations

import torch

from ...quant import unpack_ue8m0
from ._checks import IDS, check_experts, check_int
from .errors import Unsupported, refuse, require_tensor
from .events import event_of


class LowLatencyHandle:
    """What low_latency_combine needs: deep_ep's tuple of (src_info, layout_range, max tokens, hidden,
    num_experts), the first two opaque.
    """

    def __init__(self, buffer, core, handle, ids, max_tokens, num_experts):
        self._buffer, self._core, self._handle, self._ids = buffer, core, handle, ids
        self._numbers = max_tokens, core.hidden, num_experts
        self._combined = False

    def __getitem__(self, index):
        if not isinstance(index, int) or not -3 <= index <= 4 or 0 <= index < 2:
            raise Unsupported(
                "handle: src_info and layout_range are tensors of deep_ep's kernels and not made here; "
                "expected the handle only to be "
                "passed on (its items 2, 3 and 4 can be read)",
                op="handle",
            )
        return self._numbers[index - 2 if index >= 0 else index]


class LowLatency:
    """Low-latency dispatch and combine of Buffer, which says _world, rank, group_size and _require_usable."""

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts):
        """Bytes to pass as num_rdma_bytes: about what the low-latency verbs reserve for this shape on every rank."""
        for name, value in {
            "num_max_dispatch_tokens_per_rank": num_max_dispatch_tokens_per_rank,
            "hidden": hidden,
            "num_ranks": num_ranks,
            "num_experts": num_experts,
        }.items():
            check_int("get_low_latency_rdma_size_hint", name, value, 1)
        rows = (
            num_max_dispatch_tokens_per_rank * num_experts
        )  # two halves of messages, packed rows and experts' output each
        return -(-2 * rows * (3 * 2 * hidden + 4 * -(-hidden // 128) + 64) // 128) * 128

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts):
        """Nothing to clean: normal mode and low latency share no memory here."""
        self._require_usable("clean_low_latency_buffer")

    def low_latency_dispatch(
        self,
        x,
        topk_idx,
        num_max_dispatch_tokens_per_rank,
        num_experts,
        cumulative_local_expert_recv_stats=None,
        dispatch_wait_recv_cost_stats=None,
        use_fp8=True,
        round_scale=False,
        use_ue8m0=False,
        async_finish=False,
        return_recv_hook=False,
        *,
        topk_weights=None,
        x_global_scale=None,
        use_nvfp4=False,
        use_ue8m0_for_sf=False,
    ):
        """Carry every token to the ranks that own its experts, with the least delay. Collective; the first
        call of a shape makes its memory.

        Parameters
        ----------
        x : Tensor [T, hidden] bfloat16 (or float16, float32)
            T is at most num_max_dispatch_tokens_per_rank, may differ between ranks and be 0.
        topk_idx : Tensor [T, K] int64 or int32
            Global expert ids; -1: no expert.
        num_max_dispatch_tokens_per_rank, num_experts : int
            The same on all ranks.
        cumulative_local_expert_recv_stats : Tensor int32 [local experts], optional
            The counts are added to it when they arrive.
        dispatch_wait_recv_cost_stats
            Unsupported: the core does not tell from which rank it waits how long.
        use_fp8, round_scale, use_ue8m0 : bool
            Rows arrive in FP8 with a scale per 128: float32, float32 powers of two (round_scale), or UE8M0
            packed four in an int32 (use_ue8m0, which needs round_scale).
        async_finish, return_recv_hook : bool
            An event, or a hook: until it was called the results are not there, and nothing runs meanwhile. Not both.
        topk_weights, x_global_scale, use_nvfp4, use_ue8m0_for_sf
            Of the hybrid-ep branch. Unsupported.

        Returns
        -------
        (recv_x, recv_count, handle, event, hook)
            recv_x [local experts, ranks * max, hidden], with use_fp8 a pair with its scales [..,
            hidden/128] (or int32 [.., hidden/512]) column-major; recv_count int32 [local experts]; hook or
            None. At most two results live: the dispatch after the next one overwrites them.

        Raises
        ------
        InvalidArgument
            Here alone; peers that made the call wait until their deadline.
        Unsupported, PeerLost, PeerTimeout
        """
        op = "low_latency_dispatch"
        self._require_low_latency(op)
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
                f"use_fp8 is {use_fp8}, round_scale {round_scale}, use_ue8m0 {use_ue8m0}; expected each "
                f"only with the one before it",
                self.rank,
            )
        x = require_tensor(
            op, "x", x, dtypes=(torch.bfloat16, torch.float16, torch.float32), shape=(None, None)
        )
        most = num_max_dispatch_tokens_per_rank
        if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= 1 << 20 or len(x) > most:
            refuse(
                op,
                f"num_max_dispatch_tokens_per_rank is {most!r} and x has {len(x)} tokens; expected an int "
                f"that is not smaller",
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
        core = self._world.core(
            x.shape[1], num_experts, ids.shape[1], x.dtype, most, decode=True, num_sms=type(self).num_sms
        )
        with torch.no_grad():
            received, wait = core.decode_dispatch(
                x,
                ids,
                quant=("fp8_ue8m0" if round_scale else "fp8") if use_fp8 else None,
                scale_layout="column" if use_fp8 else "row",
            )
            count, scales = torch.empty(local, dtype=torch.int32, device=x.device), received.scales
            if round_scale and not use_ue8m0:  # the same powers of two in FP32
                words = -(-x.shape[1] // 128)
                scales = torch.empty(
                    (local, words, received.x.shape[1]), dtype=torch.float32, device=x.device
                ).transpose(1, 2)
        done = []

        def hook():
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
        x,
        topk_idx,
        topk_weights,
        handle,
        use_logfmt=False,
        zero_copy=False,
        async_finish=False,
        return_recv_hook=False,
        out=None,
        combine_wait_recv_cost_stats=None,
        *,
        overlap=False,
        src_signals=None,
        src_signal_expect_value=0,
        packed_recv_count=None,
        comp_signal=None,
        block_m=64,
        threshold=0,
        num_sms=3,
    ):
        """Carry the experts' rows back and sum them by their weights. Collective.

        Parameters
        ----------
        x : Tensor [local experts, ranks * max, hidden] of dispatch's dtype
            Unchanged until the hook was called.
        topk_idx : Tensor [T, K]
            As given to low_latency_dispatch.
        topk_weights : Tensor [T, K] float32
        handle
            Of the dispatch. The first combine uses its memory; each further one costs a dispatch in memory of its own.
        use_logfmt : bool
            Rows cross between nodes in LogFMT-10; inside a node they are not coded.
        zero_copy : bool
            x was written into get_next_low_latency_combine_buffer(handle), which is sent, whatever x is.
        async_finish, return_recv_hook : bool
            As for low_latency_dispatch.
        out : Tensor [T, hidden], optional
        combine_wait_recv_cost_stats
            Unsupported, as dispatch's.
        overlap, src_signals, src_signal_expect_value, packed_recv_count, comp_signal, block_m, threshold, num_sms
            Of other branches, where down-projection and combine overlap tile by tile. Unsupported: leave overlap False.

        Returns
        -------
        (combined_x [T, hidden], event, hook or None)

        Raises
        ------
        InvalidArgument
            Here alone.
        Unsupported, PeerLost, PeerTimeout
        """
        op = "low_latency_combine"
        self._require_low_latency(op)
        self._require_absent(
            op,
            combine_wait_recv_cost_stats=combine_wait_recv_cost_stats,
            overlap=overlap or None,
            src_signals=src_signals,
            packed_recv_count=packed_recv_count,
            comp_signal=comp_signal,
        )
        _require_one(op, async_finish, return_recv_hook)
        self._check_ll_handle(op, handle)
        core, used = handle._core, handle._handle
        rows = require_tensor(
            op, "x", used.rows if zero_copy else x, dtypes=(core.dtype,), shape=tuple(used.rows.shape)
        )
        ids = require_tensor(op, "topk_idx", topk_idx, dtypes=IDS, shape=tuple(handle._ids.shape))
        weights = require_tensor(
            op, "topk_weights", topk_weights, dtypes=(torch.float32,), shape=tuple(handle._ids.shape)
        )
        with torch.no_grad():
            if handle._combined:  # the same plan again, in memory that no result of the caller's lies in
                most, hidden, experts = handle._numbers
                core = self._world.core(
                    hidden,
                    experts,
                    ids.shape[1],
                    core.dtype,
                    most,
                    decode=True,
                    num_sms=core.num_sms,
                    name="combined again",
                )
                empty = torch.zeros((len(ids), hidden), dtype=core.dtype, device=ids.device)
                used = core.decode_dispatch(empty, handle._ids, quant=None, return_hook=False)[0].handle
            handle._combined = True
            y, wait = core.decode_combine(
                rows,
                ids,
                weights,
                used,
                wire="logfmt10" if use_logfmt else None,
                return_hook=return_recv_hook,
                out=out,
            )
        done = []

        def hook():
            if not done:
                done.append(True)
                wait()

        return y, event_of(async_finish, x, topk_idx, topk_weights), hook if return_recv_hook else None

    def get_next_low_latency_combine_buffer(self, handle):
        """Tensor [local experts, ranks * max, hidden] for the experts' output: written there,
        low_latency_combine(zero_copy=True) copies nothing.
        """
        self._require_low_latency("get_next_low_latency_combine_buffer")
        self._check_ll_handle("get_next_low_latency_combine_buffer", handle)
        return handle._handle.rows

    # -- rank masks -------------------------------------------------------------------------------

    def low_latency_update_mask_buffer(self, rank_to_mask, mask=False):
        """Unmask a rank, which changes nothing; masking one is refused.

        Raises
        ------
        Unsupported
            mask is True: moecomm goes on without a rank by Communicator.shrink, which makes new buffers, not by a mask.
        """
        self._require_masks("low_latency_update_mask_buffer")
        if (
            isinstance(rank_to_mask, bool)
            or not isinstance(rank_to_mask, int)
            or not 0 <= rank_to_mask < self.group_size
        ):
            refuse(
                "low_latency_update_mask_buffer",
                f"rank_to_mask is {rank_to_mask!r}; expected a rank in 0..{self.group_size - 1}",
                self.rank,
            )
        if mask:
            raise Unsupported(
                f"low_latency_update_mask_buffer: rank {rank_to_mask} cannot be masked: a call of moecomm "
                f"waits for every rank of its group. "
                "Expected a new group of the ranks that are left (moecomm.Communicator.shrink) and a Buffer of it",
                op="low_latency_update_mask_buffer",
                rank=self.rank,
                peer=rank_to_mask,
            )

    def low_latency_query_mask_buffer(self, mask_status):
        """Fill int32 [ranks] with zeros: no rank is ever masked."""
        self._require_masks("low_latency_query_mask_buffer")
        require_tensor(
            "low_latency_query_mask_buffer",
            "mask_status",
            mask_status,
            dtypes=(torch.int32,),
            shape=(self.group_size,),
        )
        mask_status.zero_()

    def low_latency_clean_mask_buffer(self):
        """Unmask all ranks: nothing to do, since none is ever masked."""
        self._require_masks("low_latency_clean_mask_buffer")

    def _require_masks(self, op):
        self._require_usable(op)
        if not self.enable_shrink:
            refuse(
                op,
                "the Buffer was made with enable_shrink=False; expected Buffer(..., low_latency_mode=True, "
                "enable_shrink=True)",
                self.rank,
            )

    def _require_low_latency(self, op):
        self._require_usable(op)
        if not self.low_latency_mode:
            refuse(
                op,
                "the Buffer was made with low_latency_mode=False; expected Buffer(..., low_latency_mode=True)",
                self.rank,
            )

    def _require_absent(self, op, **values):
        for name, value in values.items():
            if value is not None:
                raise Unsupported(
                    f"{op}: {name} is given; this drop-in has no such feature (docs/deep_ep.md says why), "
                    f"expected it left out",
                    op=op,
                    rank=self.rank,
                )

    def _check_ll_handle(self, op, handle):
        if not isinstance(handle, LowLatencyHandle) or handle._buffer._world is not self._world:
            refuse(
                op,
                f"handle is a {type(handle).__qualname__}; expected the handle of a low_latency_dispatch of this group",
                self.rank,
            )


def _require_one(op, async_finish, return_recv_hook):
    if async_finish and return_recv_hook:
        refuse(op, "async_finish and return_recv_hook are both set; expected one of them")
