"""HybridEPBuffer: the interface of deep_ep's hybrid-ep branch, with the permutation to expert order inside
dispatch and combine.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from ... import ops
from ._checks import check_int, check_rows
from ._hybrid import begin, fit, received, rows_of, state_of
from ._world import world_of
from .errors import refuse, require_tensor
from .handles import Opaque
from .maps import indices_to_map  # noqa: F401 - hybrid-ep has it here


class HybridEPBuffer:
    """Dispatch and combine by hybrid-ep's names, over moecomm. Construction is collective.

    Memory is not made here: it follows the shapes of the calls, is shared by all buffers of one group in a
    process, and grows.

    Parameters
    ----------
    group : torch ProcessGroup, one-dimensional DeviceMesh, mpi4py Comm or moecomm.Communicator
    hidden_dim, max_num_of_tokens_per_rank, num_local_experts : int
        Kept as attributes, which grow where calls bring more; a rank may bring fewer tokens, also none.
    use_fp8 : bool
        Calls bring FP8 rows as uint8 with their scaling factors.
    num_sms_dispatch_api, num_sms_combine_api, num_sms_preprocessing_api, num_blocks_permute,
    num_blocks_unpermute : int, optional
        Kept and without effect.
    load_cached_kernels, use_shared_buffer, enable_custom_allgather, num_of_hybrid_ep_ranks_per_nvlink_domain, use_mnnvl
        Without meaning here.

    Raises
    ------
    InvalidArgument
    """

    def __init__(
        self,
        group,
        hidden_dim,
        max_num_of_tokens_per_rank,
        num_local_experts,
        use_fp8=False,
        num_sms_dispatch_api=None,
        num_sms_combine_api=None,
        num_sms_preprocessing_api=None,
        num_blocks_permute=None,
        num_blocks_unpermute=None,
        load_cached_kernels=False,
        use_shared_buffer=True,
        enable_custom_allgather=False,
        num_of_hybrid_ep_ranks_per_nvlink_domain=None,
        use_mnnvl=None,
    ):
        op = "HybridEPBuffer"
        for name, value in {
            "hidden_dim": hidden_dim,
            "max_num_of_tokens_per_rank": max_num_of_tokens_per_rank,
            "num_local_experts": num_local_experts,
        }.items():
            check_int(op, name, value, 1)
        sms = {
            "num_sms_dispatch_api": num_sms_dispatch_api,
            "num_sms_combine_api": num_sms_combine_api,
            "num_sms_preprocessing_api": num_sms_preprocessing_api,
            "num_blocks_permute": num_blocks_permute,
            "num_blocks_unpermute": num_blocks_unpermute,
        }
        for name, value in sms.items():
            if value is not None:
                check_int(op, name, value, 1)
            setattr(self, name, value)
        if group is None:
            refuse(op, "group is None; expected a ProcessGroup")
        self.group, self._world = group, world_of(group)
        self.rank, self.group_size = self._world.rank, self._world.size
        self.num_of_nodes, self.num_of_ranks_per_node = (
            self._world.num_nodes,
            self._world.size // self._world.num_nodes,
        )
        self.node_rank, self.local_rank = divmod(self.rank, self.num_of_ranks_per_node)
        self.use_fp8 = bool(use_fp8)
        self.config = SimpleNamespace(
            hidden_dim=hidden_dim,
            max_num_of_tokens_per_rank=max_num_of_tokens_per_rank,
            num_of_experts_per_rank=num_local_experts,
            num_of_ranks_per_node=self.num_of_ranks_per_node,
            num_of_nodes=self.num_of_nodes,
        )
        self.configurer = SimpleNamespace(buffer_config=self.config)

    def update_template_config(
        self, hidden_dim=None, max_num_of_tokens_per_rank=None, num_local_experts=None, use_fp8=None
    ):
        """Change what calls may bring, equally on all ranks; returns the configuration."""
        op = "update_template_config"
        for name, value, kept in (
            ("hidden_dim", hidden_dim, "hidden_dim"),
            ("max_num_of_tokens_per_rank", max_num_of_tokens_per_rank, "max_num_of_tokens_per_rank"),
            ("num_local_experts", num_local_experts, "num_of_experts_per_rank"),
        ):
            if value is not None:
                check_int(op, name, value, 1, self.rank)
                setattr(self.config, kept, value)
        self.use_fp8 = self.use_fp8 if use_fp8 is None else bool(use_fp8)
        return self.config

    def empty_jit_cache(self):
        """Nothing to empty: no kernel is compiled at run time."""

    # -- one row per token and rank ---------------------------------------------------------------

    def dispatch(
        self,
        hidden,
        scaling_factor=None,
        topk_idx=None,
        topk_weights=None,
        num_of_experts=None,
        probs=None,
        routing_map=None,
        num_dispatched_tokens_tensor=None,
        num_dispatched_tokens=None,
        handle=None,
    ):
        """Carry every token to the ranks that own its experts, one row per token and rank. Collective.

        Parameters
        ----------
        hidden : Tensor [T, H]
        scaling_factor : Tensor [T, n], optional
            Travels with the rows.
        topk_idx : Tensor [T, K], topk_weights : Tensor [T, K] float32; or routing_map : Tensor bool [T, E],
        probs : Tensor float32 [T, E]
            Who goes where; none of them with a handle.
        num_of_experts : int, optional
            All ranks' experts, as the constructor says.
        num_dispatched_tokens_tensor, num_dispatched_tokens
            Without effect: sizes come from the plan.
        handle : tuple, optional
            Of an earlier dispatch: its plan is used again.

        Returns
        -------
        (token, probs, scaling_factor, handle)
            Rows in order (source rank, source token); probs float32 [N, experts of the node], zero but for
            this rank's; the handle has 7 items.

        Raises
        ------
        InvalidArgument, ConfigMismatch
            On every rank, where one rank's arguments are wrong (by a handle: here alone).
        PeerLost, PeerTimeout
        """
        op = "dispatch"
        routing, payload, weights = begin(
            op,
            self._world,
            self.config,
            hidden,
            scaling_factor,
            topk_idx,
            topk_weights,
            num_of_experts,
            None,
            probs,
            routing_map,
            handle,
            {"permuted": 0},
            lambda k, local: dict(layout="rank"),
        )
        local = routing.experts // self.group_size
        with torch.no_grad():
            out = routing.dispatch(payload.hidden, payload.dtype, payload.x, weights)
            rows, scales = received(payload, out)
            recv_probs = None
            if handle is None:
                first, ids = self.local_rank * local, out.topk_ids
                here = (
                    torch.zeros((len(ids), local + 1), dtype=torch.bool, device=ids.device)
                    .scatter_(1, ids + 1, True)[:, 1:]
                    .contiguous()
                )
                count = torch.full((1,), len(ids), dtype=torch.int32, device=ids.device)
                handle = (
                    Opaque((routing, None)),
                    Opaque(),
                    Opaque(),
                    count,
                    here,
                    routing.tokens,
                    self.config,
                )
                if weights is not None:
                    recv_probs = torch.zeros(
                        (len(ids), local * self.num_of_ranks_per_node + 1),
                        dtype=torch.float32,
                        device=ids.device,
                    )
                    recv_probs = recv_probs.scatter_(
                        1, torch.where(ids < 0, 0, ids + first + 1), out.topk_weights
                    )[:, 1:].contiguous()
            elif weights is not None:
                refuse(op, "probs are given with a handle; expected them left out", self.rank)
        return rows, recv_probs, scales, handle

    def combine(self, hidden, probs=None, handle=None):
        """Carry rows back and sum them, without weights. Collective.

        Parameters
        ----------
        hidden : Tensor [N, H]
        probs : Tensor float32 [N, experts of the node], optional
            The columns of this rank's experts go back to the tokens.
        handle : tuple
            Of dispatch.

        Returns
        -------
        (token, probs)
            [T, H], and float32 [T, E] or None.

        Raises
        ------
        InvalidArgument, PeerLost, PeerTimeout
        """
        op = "combine"
        routing, _ = state_of(op, handle, "rank", self._world)
        rows = check_rows(op, hidden, routing.num_rows, self.rank)
        local = routing.experts // self.group_size
        probs = require_tensor(
            op,
            "probs",
            probs,
            optional=True,
            dtypes=(torch.float32,),
            shape=(routing.num_rows, local * self.num_of_ranks_per_node),
        )
        with torch.no_grad():
            y, back = routing.combine(rows), None
            if probs is not None:
                dense = torch.zeros((len(rows), routing.experts), dtype=torch.float32, device=rows.device)
                dense[:, self.rank * local : (self.rank + 1) * local] = probs[
                    :, self.local_rank * local : (self.local_rank + 1) * local
                ]
                back = routing.combine_numbers(dense)
        return y, back

    # -- in expert order --------------------------------------------------------------------------

    def dispatch_with_permute(
        self,
        *,
        hidden,
        topk_idx=None,
        topk_weights=None,
        num_of_experts_per_rank=None,
        num_of_experts=None,
        use_fp8=None,
        routing_map=None,
        probs=None,
        scaling_factor=None,
        num_permuted_tokens=None,
        pad_multiple=None,
        handle=None,
        non_blocking=False,
        fuse_permute_dispatch=False,
        num_dispatched_tokens=None,
        use_host_meta=None,
    ):
        """Carry every token to the ranks that own its experts, one row per token and expert, in expert
        order. Collective.

        Parameters
        ----------
        hidden, topk_idx, topk_weights, routing_map, probs, scaling_factor, num_of_experts
            As for dispatch.
        num_of_experts_per_rank : int, optional
            None: the constructor's.
        use_fp8 : bool, optional
            True: scaling_factor is needed.
        num_permuted_tokens : int, optional
            Static number of rows, a multiple of pad_multiple; needed with non_blocking. Where more arrive,
            rows behind it are dropped and the handle's last item, the overflow flag, is 1.
        pad_multiple : int, optional
            Every expert's rows are padded to a multiple with zeros.
        handle : tuple, optional
            Of an earlier dispatch_with_permute: its plan is used again.
        non_blocking : bool
            Results have static sizes. The host still waits, so it is not for CUDA graphs (with a handle it is).
        fuse_permute_dispatch, num_dispatched_tokens, use_host_meta
            Without effect: dispatch puts rows in their final order anyway.

        Returns
        -------
        (token, probs, scaling_factor, tokens_per_expert, handle)
            probs float32 [N] or None; tokens_per_expert int64 [local experts], padded; the handle has 11 items.

        Raises
        ------
        InvalidArgument, ConfigMismatch
            On every rank, where one rank's arguments are wrong (by a handle: here alone).
        PeerLost, PeerTimeout
        """
        op = "dispatch_with_permute"
        pad = 1 if pad_multiple is None else pad_multiple

        def how(k, local):
            check_int(op, "pad_multiple", pad, 1, self.rank)
            if num_permuted_tokens is not None:
                check_int(op, "num_permuted_tokens", num_permuted_tokens, 0, self.rank)
            if num_permuted_tokens is None and non_blocking:
                refuse(
                    op,
                    "non_blocking is set and num_permuted_tokens is None; expected the number of rows",
                    self.rank,
                )
            if num_permuted_tokens is not None and num_permuted_tokens % pad:
                refuse(
                    op,
                    f"num_permuted_tokens is {num_permuted_tokens}; expected a multiple of pad_multiple = {pad}",
                    self.rank,
                )
            if use_fp8 and scaling_factor is None:
                refuse(
                    op,
                    "use_fp8 is set and scaling_factor is None; expected rows and their scaling factors",
                    self.rank,
                )
            return dict(
                layout="expert", expert_alignment=pad
            )  # the budget cuts what arrives: too many rows are no error here

        same = {
            "permuted": 1,
            "pad_multiple": pad if isinstance(pad, int) else -1,
            "num_permuted_tokens": num_permuted_tokens if isinstance(num_permuted_tokens, int) else -1,
        }
        routing, payload, weights = begin(
            op,
            self._world,
            self.config,
            hidden,
            scaling_factor,
            topk_idx,
            topk_weights,
            num_of_experts,
            num_of_experts_per_rank,
            probs,
            routing_map,
            handle,
            same,
            how,
        )
        budget = num_permuted_tokens
        if handle is not None:
            routing, budget = state_of(op, handle, "expert", self._world)
            for name, given, kept in (
                ("pad_multiple", pad_multiple, routing.how["expert_alignment"]),
                ("num_permuted_tokens", num_permuted_tokens, rows_of(routing, budget)),
            ):
                if given is not None and given != kept:
                    refuse(
                        op, f"{name} is {given} and the handle's is {kept}; expected it left out", self.rank
                    )
        with torch.no_grad():
            out = routing.dispatch(payload.hidden, payload.dtype, payload.x, weights)
            recv_probs = None if weights is None else out.topk_weights
            rows, scales = received(payload, out)
            n = rows_of(routing, budget)
            rows, scales, recv_probs = (None if t is None else fit(t, n) for t in (rows, scales, recv_probs))
            if handle is None:
                ends = out.rows_per_expert.cumsum(0)
                flag = (ends[-1:] > n).to(torch.int32)
                ends = ends.clamp(max=n)
                counts = torch.diff(ends, prepend=ends.new_zeros(1))
                handle = (
                    Opaque((routing, budget)),
                    *(Opaque() for _ in range(6)),
                    counts,
                    routing.tokens,
                    self.config,
                    flag,
                )
        return rows, recv_probs, scales, handle[7], handle

    def combine_with_unpermute(
        self,
        *,
        hidden,
        probs=None,
        handle=None,
        pad_multiple=None,
        fuse_unpermute_combine=False,
        num_dispatched_tokens=None,
    ):
        """Carry rows in expert order back and sum them, without weights. Collective.

        Parameters
        ----------
        hidden : Tensor [N, H]
        probs : Tensor float32 [N], optional
            Each goes back to the pick that its row came from.
        handle : tuple
            Of dispatch_with_permute.
        pad_multiple : int, optional
            The handle's.
        fuse_unpermute_combine, num_dispatched_tokens
            Without effect.

        Returns
        -------
        (token, probs)
            [T, H]; float32 [T, E], zero where there is no pick, or None.

        Raises
        ------
        InvalidArgument, PeerLost, PeerTimeout
        """
        op = "combine_with_unpermute"
        routing, budget = state_of(op, handle, "expert", self._world)
        if pad_multiple is not None and pad_multiple != routing.how["expert_alignment"]:
            refuse(
                op,
                f"pad_multiple is {pad_multiple} and the handle's is {routing.how['expert_alignment']}; "
                f"expected it left out",
                self.rank,
            )
        n = rows_of(routing, budget)
        rows = check_rows(op, hidden, n, self.rank)
        probs = require_tensor(op, "probs", probs, optional=True, dtypes=(torch.float32,), shape=(n,))
        with torch.no_grad():
            rows = fit(rows, routing.num_rows)
            if probs is None:
                return routing.combine(rows), None
            core, plan = routing.plan(rows.shape[1], rows.dtype)
            y, slots = ops.combine_slots(
                rows, fit(probs, routing.num_rows), plan.tensor(), core.number, "expert", routing.tokens
            )
            dense = torch.zeros(
                (routing.tokens, routing.experts + 1), dtype=torch.float32, device=rows.device
            )
            return y, dense.scatter_(1, routing.ids.to(torch.int64) + 1, slots)[:, 1:].contiguous()
