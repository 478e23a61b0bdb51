"""Handles of the three buffers. A dispatch returns them, and they are passed to later calls."""

from __future__ import annotations

from typing import Any

import torch

from ._checks import aligned
from .errors import Unsupported
from .events import EventHandle


class DispatchHandle:
    """Handle of a dispatch, for combine and for later dispatches with the same plan.

    Opaque: it has none of the tensors of deep_ep's tuple, which belong to deep_ep's kernels.
    """

    def __init__(self, routing: Any) -> None:
        self.routing = routing

    def __iter__(self) -> Any:
        return self._opaque()

    def __getitem__(self, index: Any) -> Any:
        return self._opaque()

    def _opaque(self) -> None:
        raise Unsupported(
            "handle: this handle is opaque; it has none of the tensors in deep_ep's tuple, pass it to calls unchanged",
            op="handle",
        )


class EPHandle:
    """Handle of a dispatch, for combine and for later dispatches with the same plan. It also has the counts.

    Attributes
    ----------
    num_recv_tokens_per_expert_list : list of int
        Rows per local expert, rounded up to the alignment; [] without do_cpu_sync.
    psum_num_recv_tokens_per_scaleup_rank : Tensor int32 [ranks per node]
        Cumulative sums of the received tokens by the local rank of their source.
    psum_num_recv_tokens_per_expert : Tensor int32 [local experts]
        Cumulative sums of the rows per expert. With do_expand: index after the last row of each expert, without
        padding.
    num_unaligned_recv_tokens_per_expert : Tensor int32 [local experts]
        Rows per local expert without padding.
    num_recv_tokens, num_expanded_tokens : int
        Received tokens; rows with do_expand, else 0.
    topk_idx, do_expand, num_experts, expert_alignment, num_sms
        As given to dispatch.
    """

    def __init__(
        self,
        routing: Any,
        out: Any,
        scaleup_ranks: Any,
        do_expand: Any,
        alignment: Any,
        num_sms: int,
        sync: Any,
    ) -> None:
        self.routing = routing
        self.topk_idx, self.num_experts, self.num_sms = routing.ids, routing.experts, num_sms
        self.do_expand, self.expert_alignment = do_expand, alignment
        counts, rows = out.tokens_per_expert, out.rows_per_expert
        self.num_unaligned_recv_tokens_per_expert = counts.to(torch.int32)
        if do_expand:
            self.psum_num_recv_tokens_per_expert = (rows.cumsum(0) - rows + counts).to(torch.int32)
        else:
            self.psum_num_recv_tokens_per_expert = counts.cumsum(0).to(torch.int32)
        self.num_recv_tokens_per_expert_list = aligned(counts.tolist(), alignment) if sync else []
        self._arrival = routing.arrival
        if self._arrival is None:
            self._read_sources(out)
        else:
            self._arrival.call_after(lambda: self._read_sources(out))
        self._scaleup_ranks = scaleup_ranks
        self._psum: torch.Tensor | None = None

    def _read_sources(self, out: Any) -> None:
        """Keep the sources of the rows, and nothing else of the result, whose memory may then be used again."""
        self._source_rank, self._source_token, self._arrival = out.source_rank, out.source_token, None
        self._sources_read = EventHandle()

    @property
    def psum_num_recv_tokens_per_scaleup_rank(self) -> Any:
        """Cumulative sums of the received tokens by the local rank of their source, int32 [ranks per node]."""
        if self._psum is None:
            if self._arrival is not None:
                self._arrival.wait()
            self._sources_read.current_stream_wait()
            ranks, tokens = self._source_rank, self._source_token
            if self.do_expand:  # a token has one row per expert, but counts once
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
    def num_recv_tokens(self) -> int:
        """Number of received tokens. On a GPU the host waits for it."""
        return int(self.psum_num_recv_tokens_per_scaleup_rank[-1])

    @property
    def num_expanded_tokens(self) -> Any:
        """Number of rows with padding if do_expand is set, else 0."""
        return self.routing.num_rows if self.do_expand else 0

    @property
    def recv_src_metadata(self) -> None:
        """Not supported.

        Raises
        ------
        Unsupported
            Always.
        """
        raise Unsupported(
            "EPHandle.recv_src_metadata: moecomm has no such data, it belongs to deep_ep's combine kernel; "
            "pass the handle to calls unchanged",
            op="EPHandle",
        )


class Opaque:
    """An opaque item of a handle, in place of a tensor of hybrid-ep's kernels."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unsupported(
            f"handle: this item is opaque and has no .{name}, it belongs to hybrid-ep's kernels; "
            "pass the handle to calls unchanged",
            op="handle",
        )
