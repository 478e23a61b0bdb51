"""Prediction of one step: times, bytes per link and memory."""

from __future__ import annotations

from typing import Any

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from ...buffer import Buffer
from .. import Cluster
from .question import route


@dataclass(frozen=True)
class Prediction:
    """Prediction of one step.

    Attributes
    ----------
    dispatch_us, combine_us : float
        Median time over ranks.
    dispatch_slowest_us, combine_slowest_us : float
        Time of the slowest rank.
    rail_bytes, node_bytes : float
        Bytes per rank that cross the hop, mean over ranks.
    rail_bytes_most, node_bytes_most : float
        Bytes of the rank that sends most over the hop.
    hottest : str
        The link with the longest busy time.
    hottest_share : float
        Busy time of that link divided by the time of the step.
    buffer_bytes : int
        Memory that a Buffer reserves on each rank; for decode, the memory of the decode path alone.
    """

    dispatch_us: float
    dispatch_slowest_us: float
    combine_us: float
    combine_slowest_us: float
    rail_bytes: float
    rail_bytes_most: float
    node_bytes: float
    node_bytes_most: float
    hottest: str
    hottest_share: float
    buffer_bytes: int

    @property
    def communication_us(self) -> Any:
        """Dispatch and combine of the slowest rank, for which the layer waits."""
        return self.dispatch_slowest_us + self.combine_slowest_us


def predict(question: Any, seed: int = 0) -> Any:
    """Simulate one step of the layer.

    Raises
    ------
    InvalidArgument
        As route.
    """
    q = question
    ids = route(q, seed)
    cluster = Cluster(
        q.ranks,
        ranks_per_node=q.ranks_per_node,
        hidden=q.model.hidden,
        num_experts=q.slots,
        top_k=q.top_k,
        max_tokens=q.tokens,
        dtype=torch.bfloat16,
        num_sms=q.num_sms,
        hardware=q.cluster.hardware,
        decode=q.decode,
    )
    step = cluster.decode_step(ids, quant=q.quant) if q.decode else cluster.step(ids, quant=q.quant)
    links = step.links
    rail, node = (
        np.array([link[hop]["row_bytes"] + link[hop]["other_bytes"] for link in links], float)
        for hop in ("rail", "node")
    )
    busy = {
        (rank, name): picoseconds
        for rank, link in enumerate(links)
        for name, picoseconds in link["busy"].items()
    }
    (rank, name), longest = max(busy.items(), key=lambda item: item[1])
    return Prediction(
        float(np.median(step.dispatch_us)),
        float(step.dispatch_us.max()),
        float(np.median(step.combine_us)),
        float(step.combine_us.max()),
        float(rail.mean()),
        float(rail.max()),
        float(node.mean()),
        float(node.max()),
        f"{name.replace('_', ' ')} of rank {rank}",
        longest / 1e6 / step.total_us,
        _buffer_bytes(q),
    )


def _buffer_bytes(q: Any) -> Any:
    comm: Any = SimpleNamespace(rank=0, size=q.ranks, ranks_per_node=q.ranks_per_node, num_nodes=q.nodes)
    shape = dict(hidden=q.model.hidden, num_experts=q.slots, top_k=q.top_k, max_tokens=q.tokens)
    whole = Buffer.size_hint(comm, **shape, decode=q.decode)
    return whole - Buffer.size_hint(comm, **shape) if q.decode else whole
