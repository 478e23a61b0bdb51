"""Sizes that ElasticBuffer computes: domains, bytes, rows and multiprocessors."""

from __future__ import annotations

from typing import Any

import math

_DEFAULT_TOPK = 32  # for num_topk=0, as in deep_ep
_MEBIBYTES = 1 << 20


def bytes_for(group: Any, max_tokens: int, hidden: int, top_k: int, fp8: Any) -> Any:
    """Estimated bytes of one dispatch and combine of this shape, a multiple of 2 MiB."""
    size = (
        group.size()
        if callable(getattr(group, "size", None))
        else getattr(group, "size", None) or group.Get_size()
    )
    row = 2 * hidden + (hidden + hidden // 32 if fp8 else 2 * hidden) + 16 * (top_k or _DEFAULT_TOPK) + 64
    return -(-2 * size * max_tokens * row // (2 * _MEBIBYTES)) * 2 * _MEBIBYTES


def rows_for(ranks: Any, max_tokens: int, top_k: int, local_experts: Any, alignment: Any, expand: Any) -> Any:
    """Maximum number of rows of a dispatch, for calls without do_cpu_sync."""
    rows = ranks * max_tokens
    if not expand:
        return rows
    rows = rows * min(top_k, local_experts) + (alignment - 1) * local_experts
    return -(-rows // alignment) * alignment


def multiprocessors_for(
    nodes: Any, per_node: int, experts: Any, top_k: int, scaleout_top_k: Any, links: Any
) -> Any:
    """Number of multiprocessors that saturates the slowest link: even, in 2..64."""
    rdma, nvlink, sm_read, sm_write = links

    def reached(parts: Any) -> Any:
        """Expected number of distinct parts that contain the top_k distinct experts of a token."""
        each = experts // parts
        return parts * (1 - math.comb(experts - each, top_k) / math.comb(experts, top_k))

    to_ranks = reached(nodes * per_node)
    to_nodes = min(reached(nodes), scaleout_top_k or nodes) * (nodes - 1) / nodes
    seconds = max(to_nodes / (rdma or 50), to_ranks * (per_node - 1) / per_node / (nvlink or 160), 1e-9)
    needed = 1.25 * max((1 + to_nodes) / sm_read, (to_nodes + to_ranks) / sm_write) / seconds
    return max(2, min(64, 2 * math.ceil(needed / 2)))
