"""Handles of the three buffers: opaque, made by a dispatch and passed on."""

from __future__ import annotations

import torch

from ._checks import aligned
from .errors import Unsupported


class DispatchHandle:
    """What combine and a cached dispatch need.

    Opaque: deep_ep's tuples of tensors are its kernels' and not made here.
    """

    def __init__(self, routing):
        self._routing = routing

    def __iter__(self):
        return self._opaque()

    def __getitem__(self, index):
        return self._opaque()

    def _opaque(self):
        raise Unsupported(
            "handle: deep_ep's handle is a tuple of its kernels' tensors, this one is opaque; expected it "
            "only to be passed on",
            op="handle",
        )


class EPHandle:
    """What combine and a cached dispatch need, and the counts of a dispatch.

    .num_recv_tokens_per_expert_list: rows per local expert, aligned; [] without do_cpu_sync.
    .psum_num_recv_tokens_per_scaleup_rank int32: received tokens by their source's place in its node,
    summed up; the last one is all of them. .psum_num_recv_tokens_per_expert int32: in the plain layout
    summed up; expanded, each expert's start plus its rows. .num_unaligned_recv_tokens_per_expert int32
    [local experts]. .num_recv_tokens and .num_expanded_tokens: received tokens, and rows of the expanded
    layout (0 in the plain one). .topk_idx, .do_expand, .num_experts, .expert_alignment, .num_sms.
    """

    def __init__(self, routing, out, scaleup_ranks, do_expand, alignment, num_sms, sync):
        self._routing = routing
        self.topk_idx, self.num_experts, self.num_sms = routing.ids, routing.experts, num_sms
        self.do_expand, self.expert_alignment = do_expand, alignment
        counts, rows = out.tokens_per_expert, out.rows_per_expert
        self.num_unaligned_recv_tokens_per_expert = counts.to(torch.int32)
        if do_expand:
            self.psum_num_recv_tokens_per_expert = (rows.cumsum(0) - rows + counts).to(torch.int32)
        else:
            self.psum_num_recv_tokens_per_expert = counts.cumsum(0).to(torch.int32)
        self.num_recv_tokens_per_expert_list = aligned(counts.tolist(), alignment) if sync else []
        self._source_rank, self._source_token = out.source_rank, out.source_token
        self._scaleup_ranks, self._psum = scaleup_ranks, None

    @property
    def psum_num_recv_tokens_per_scaleup_rank(self):
        """int32 [ranks of a node], inclusive sums."""
        if self._psum is None:
            ranks, tokens = self._source_rank, self._source_token
            if self.do_expand:  # a token comes once per expert here, and counts once
                _, first = torch.unique(
                    torch.where(ranks < 0, -1, ranks * (1 << 32) + tokens), return_inverse=True
                )
                new = torch.zeros(
                    int(first.max()) + 1 if len(first) else 0, dtype=torch.int64, device=ranks.device
                ).scatter_reduce_(0, first, ranks, "amax", include_self=False)
                ranks = new
            place = torch.where(ranks < 0, self._scaleup_ranks, ranks % self._scaleup_ranks)
            counted = torch.zeros(self._scaleup_ranks + 1, dtype=torch.int64, device=ranks.device).index_add_(
                0, place, torch.ones_like(place)
            )
            self._psum = counted[:-1].cumsum(0).to(torch.int32)
        return self._psum

    @property
    def num_recv_tokens(self):
        """Received tokens; waits for a GPU."""
        return int(self.psum_num_recv_tokens_per_scaleup_rank[-1])

    @property
    def num_expanded_tokens(self):
        """Rows of the expanded layout with their padding, 0 in the plain one."""
        return self._routing.num_rows if self.do_expand else 0

    @property
    def recv_src_metadata(self):
        """Not there.

        Raises
        ------
        Unsupported
            Always.
        """
        raise Unsupported(
            "EPHandle.recv_src_metadata: it is the linked lists of deep_ep's combine kernel, which this "
            "library has none of; expected the "
            "handle only to be passed on",
            op="EPHandle",
        )


class Opaque:
    """A place of a handle where hybrid-ep keeps what its kernels need; only to be passed on."""

    def __init__(self, state=None):
        self._state = state

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unsupported(
            f"handle: .{name} of a tensor that only hybrid-ep's kernels have; expected the handle only to be passed on",
            op="handle",
        )
