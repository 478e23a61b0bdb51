"""Sizes that ElasticBuffer computes: domains, bytes, rows and multiprocessors."""

from __future__ import annotations

import math

_DEFAULT_TOPK = 32  # for num_topk=0, as in deep_ep
_MEBIBYTES = 1 << 20


def bytes_for(group, max_tokens, hidden, top_k, fp8):
    """Estimated bytes of one dispatch and combine of this shape, a multiple of 2 MiB."""
    size = (
        group.size()
        if callable(getattr(group, "size", None))
        else getattr(group, "size", None) or group.Get_size()
    )
    row = 2 * hidden + (hidden + hidden // 32 if fp8 else 2 * hidden) + 16 * (top_k or _DEFAULT_TOPK) + 64
    return -(-2 * size * max_tokens * row // (2 * _MEBIBYTES)) * 2 * _MEBIBYTES


def rows_for(ranks, max_tokens, top_k, local_experts, alignment, expand):
    """Maximum number of rows of a dispatch, for calls without do_cpu_sync."""
    rows = ranks * max_tokens
    if not expand:
        return rows
    rows = rows * min(top_k, local_experts) + (alignment - 1) * local_experts
    return -(-rows // alignment) * alignment


def multiprocessors_for(nodes, per_node, experts, top_k, scaleout_top_k, links):
    """Number of multiprocessors that saturates the slowest link: even, in 2..64."""
    rdma, nvlink, sm_read, sm_write = links

    def reached(parts):
        """Expected number of distinct parts that contain the top_k distinct experts of a token."""
        each = experts // parts
        return parts * (1 - math.comb(experts - each, top_k) / math.comb(experts, top_k))

    to_ranks = reached(nodes * per_node)
    to_nodes = min(reached(nodes), scaleout_top_k or nodes) * (nodes - 1) / nodes
    seconds = max(to_nodes / (rdma or 50), to_ranks * (per_node - 1) / per_node / (nvlink or 160), 1e-9)
    needed = 1.25 * max((1 + to_nodes) / sm_read, (to_nodes + to_ranks) / sm_write) / seconds
    return max(2, min(64, 2 * math.ceil(needed / 2)))
