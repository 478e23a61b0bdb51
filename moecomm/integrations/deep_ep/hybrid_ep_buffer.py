"""HybridEPBuffer: the interface of deep_ep's hybrid-ep branch. dispatch and combine can permute to expert order."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from ... import ops
from ._checks import check_int, check_rows
from ._hybrid import begin, check_kept, fit, received, rows_of, state_of
from ._reporting import Reporting
from ._world import world_of
from .errors import refuse, require_tensor
from .handles import Opaque
from .maps import indices_to_map  # noqa: F401 - imported from here by callers


class HybridEPBuffer:
    """Dispatch and combine with hybrid-ep's interface, over moecomm. Construction is collective.

    The constructor reserves no memory. The first call of a shape does. All buffers of one group in a process share
    the memory, and it grows.

    Parameters
    ----------
    group : torch ProcessGroup, one-dimensional DeviceMesh, mpi4py Comm or moecomm.Communicator
        The ranks.
    hidden_dim, max_num_of_tokens_per_rank, num_local_experts : int
        Stored in .config and increased by larger calls. A rank may have fewer tokens, including none.
    use_fp8 : bool
        Rows are FP8, as uint8 with scaling factors.
    num_sms_dispatch_api, num_sms_combine_api, num_sms_preprocessing_api, num_blocks_permute,
    num_blocks_unpermute : int, optional
        Stored as attributes, without effect.
    load_cached_kernels, use_shared_buffer, enable_custom_allgather, num_of_hybrid_ep_ranks_per_nvlink_domain,
    use_mnnvl
        Ignored.

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
        self.group, self.world = group, world_of(group)
        self.rank, self.group_size = self.world.rank, self.world.size
        self.num_of_nodes, self.num_of_ranks_per_node = (
            self.world.num_nodes,
            self.world.size // self.world.num_nodes,
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
        """Change the configuration, equally on all ranks, and return it."""
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
        """Do nothing: no kernel is compiled at run time."""

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
        """Send every token to the ranks that own its experts, one row per token and rank. Collective.

        Parameters
        ----------
        hidden : Tensor [T, H]
        scaling_factor : Tensor [T, n], optional
            Sent with the rows.
        topk_idx : Tensor [T, K], topk_weights : Tensor [T, K] float32; or routing_map : Tensor bool [T, E],
        probs : Tensor float32 [T, E]
            The routing, as picks or as dense maps. None with a handle.
        num_of_experts : int, optional
            Experts over all ranks. Must agree with the constructor.
        num_dispatched_tokens_tensor, num_dispatched_tokens
            Ignored: sizes come from the plan.
        handle : tuple, optional
            Handle of an earlier dispatch, whose plan is reused.

        Returns
        -------
        (token, probs, scaling_factor, handle)
            Rows are ordered by (source rank, source token). probs is float32 [N, experts of the node] and zero for
            experts of other ranks. The handle has 7 items.

        Raises
        ------
        InvalidArgument, ConfigMismatch
            An argument is wrong. Raised on all ranks.
        PeerLost, PeerTimeout
            A peer has died or stalled.
        """
        op = "dispatch"
        routing, payload, weights = begin(
            op,
            self.world,
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
                refuse(op, "probs is given; expected None, because a handle is given", self.rank)
        return rows, recv_probs, scales, handle

    def combine(self, hidden, probs=None, handle=None):
        """Send rows back and sum them, without weights. Collective.

        Parameters
        ----------
        hidden : Tensor [N, H]
        probs : Tensor float32 [N, experts of the node], optional
            The columns of this rank's experts are returned to the tokens.
        handle : tuple
            Handle of dispatch.

        Returns
        -------
        (token, probs)
            [T, H], and float32 [T, E] or None.

        Raises
        ------
        InvalidArgument
            An argument is wrong. Raised on all ranks.
        PeerLost, PeerTimeout
        """
        op = "combine"
        with Reporting(self.world, "combine") as reporting:
            routing, _ = state_of(op, handle, "rank", self.world)
            reporting.at(*routing.first)
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
        """Send every token to the ranks that own its experts, one row per pick, grouped by expert. Collective.

        Parameters
        ----------
        hidden, topk_idx, topk_weights, routing_map, probs, scaling_factor, num_of_experts
            As for dispatch.
        num_of_experts_per_rank : int, optional
            Default: num_local_experts of the constructor.
        use_fp8 : bool, optional
            True requires scaling_factor.
        num_permuted_tokens : int, optional
            Static number of rows, a multiple of pad_multiple; required with non_blocking. Further rows are dropped,
            and the overflow flag, the last item of the handle, is set to 1.
        pad_multiple : int, optional
            The rows of every expert are padded with zeros to a multiple of it.
        handle : tuple, optional
            Handle of an earlier dispatch_with_permute, whose plan is reused.
        non_blocking : bool
            Results have static sizes. The host still waits, so a CUDA graph needs a handle.
        fuse_permute_dispatch, num_dispatched_tokens, use_host_meta
            Ignored: dispatch always writes rows in their final order.

        Returns
        -------
        (token, probs, scaling_factor, tokens_per_expert, handle)
            probs float32 [N] or None; tokens_per_expert int64 [local experts], with padding; the handle has 11 items.

        Raises
        ------
        InvalidArgument, ConfigMismatch
            An argument is wrong. Raised on all ranks.
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
                    "num_permuted_tokens is None; expected the number of rows, because non_blocking is set",
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
                    "scaling_factor is None; expected the scaling factors of the rows, because use_fp8 is set",
                    self.rank,
                )
            # No capacity: rows beyond num_permuted_tokens are dropped, not an error.
            return dict(layout="expert", expert_alignment=pad)

        same = {
            "permuted": 1,
            "pad_multiple": pad if isinstance(pad, int) else -1,
            "num_permuted_tokens": num_permuted_tokens if isinstance(num_permuted_tokens, int) else -1,
        }
        routing, payload, weights = begin(
            op,
            self.world,
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
            budget = check_kept(op, self.world, handle, pad_multiple, num_permuted_tokens)
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
        """Send rows that are grouped by expert back and sum them, without weights. Collective.

        Parameters
        ----------
        hidden : Tensor [N, H]
        probs : Tensor float32 [N], optional
            Each is returned to the pick of its row.
        handle : tuple
            Handle of dispatch_with_permute.
        pad_multiple : int, optional
            Must equal that of the handle.
        fuse_unpermute_combine, num_dispatched_tokens
            Ignored.

        Returns
        -------
        (token, probs)
            [T, H]; float32 [T, E], zero without a pick, or None.

        Raises
        ------
        InvalidArgument
            An argument is wrong. Raised on all ranks.
        PeerLost, PeerTimeout
        """
        op = "combine_with_unpermute"
        with Reporting(self.world, "combine") as reporting:
            routing, budget = state_of(op, handle, "expert", self.world)
            reporting.at(*routing.first)
            if pad_multiple is not None and pad_multiple != routing.how["expert_alignment"]:
                refuse(
                    op,
                    f"pad_multiple is {pad_multiple}; expected None, or {routing.how['expert_alignment']} as in the "
                    "handle",
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
                rows, fit(probs, routing.num_rows), plan.tensor(), core.name, "expert", routing.tokens
            )
            dense = torch.zeros(
                (routing.tokens, routing.experts + 1), dtype=torch.float32, device=rows.device
            )
            return y, dense.scatter_(1, routing.ids.to(torch.int64) + 1, slots)[:, 1:].contiguous()
