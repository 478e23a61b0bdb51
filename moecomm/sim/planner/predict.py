"""One simulated step: what it costs, what crosses which link, what it needs in memory."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from ...buffer import Buffer
from .. import Cluster
from .question import route


@dataclass(frozen=True)
class Prediction:
    """Times in us (median over ranks, slowest rank), bytes per rank that cross each hop (mean, most), memory per rank.

    hottest : str
        The link that is busy longest.
    hottest_share : float
        Its busy time over the step's.
    buffer_bytes : int
        What a Buffer reserves on each rank (the decode path's memory alone, where it is asked for).
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
    def communication_us(self):
        """Dispatch and combine of the slowest rank: what a layer waits for."""
        return self.dispatch_slowest_us + self.combine_slowest_us


def predict(question, seed=0):
    """Simulate one step of the question's layer.

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
    crossed = {
        hop: np.array([link[hop]["row_bytes"] + link[hop]["other_bytes"] for link in links], float)
        for hop in ("rail", "node")
    }
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
        *(
            f(crossed[hop])
            for hop in ("rail", "node")
            for f in (lambda a: float(a.mean()), lambda a: float(a.max()))
        ),
        f"{name.replace('_', ' ')} of rank {rank}",
        longest / 1e6 / step.total_us,
        _buffer_bytes(q),
    )


def _buffer_bytes(q):
    comm = SimpleNamespace(rank=0, size=q.ranks, ranks_per_node=q.ranks_per_node, num_nodes=q.nodes)
    shape = dict(hidden=q.model.hidden, num_experts=q.slots, top_k=q.top_k, max_tokens=q.tokens)
    whole = Buffer.size_hint(comm, **shape, decode=q.decode)
    return whole - Buffer.size_hint(comm, **shape) if q.decode else whole
