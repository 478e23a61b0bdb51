"""LoadMonitor: what dispatch has counted, and whether moving experts would pay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .placement import Placement, rebalance, require


@dataclass(frozen=True)
class Advice:
    """What a rebalance would bring: pays; gain and cost in seconds over the horizon; balancedness before and after; the placement."""

    pays: bool
    gain: float
    cost: float
    before: float
    after: float
    placement: Placement


class LoadMonitor:
    """Picks per layer and logical expert, fed by dispatch itself: Buffer(..., monitor=monitor).

    Keeps the last `window` batches of every layer, and an average in which a batch weighs half as much after
    `half_life` further ones. Counts of this rank's tokens, or of all where the dispatch exchanged them anyway.

    Parameters
    ----------
    num_layers, num_experts : int
    window : int
        Batches per layer.
    half_life : float
        In batches.

    Raises
    ------
    InvalidArgument
        A number is out of range.

    Source: DeepSeek-V3 technical report, section 3.4.1 (statistics of online serving).
    """

    def __init__(self, num_layers, num_experts, *, window=64, half_life=64.0):
        for name, value in dict(num_layers=num_layers, num_experts=num_experts, window=window).items():
            require(isinstance(value, int) and value >= 1, "LoadMonitor", name, value, "an int >= 1")
        require(half_life > 0, "LoadMonitor", "half_life", half_life, "batches > 0")
        self.shape, self.window = (num_layers, num_experts), window
        self._decay = 0.5 ** (1.0 / half_life)
        self.reset()

    def reset(self):
        """Forget everything."""
        layers, experts = self.shape
        self._recent = np.zeros((self.window, layers, experts), dtype=np.int64)
        self._average = np.zeros(self.shape)
        self._everywhere = None
        self.batches = np.zeros(layers, dtype=np.int64)   # recorded, per layer

    def record(self, layer, counts, *, everywhere=False):
        """Add one batch's picks, int [E]; everywhere: of all ranks, else of this one. Called by dispatch.

        Raises
        ------
        InvalidArgument
            Both kinds are mixed since the last reset.
        """
        require(self._everywhere in (None, everywhere), "LoadMonitor", "everywhere", everywhere, "the same kind of counts since the last reset")
        self._everywhere = everywhere
        self._recent[self.batches[layer] % self.window, layer] = counts
        self._average[layer] = self._average[layer] * self._decay + counts
        self.batches[layer] += 1

    def load(self, comm=None, *, weighted=True):
        """Load float64 [L, E]: the weighted average, or the sum of the window. Collective with comm: summed over its ranks.

        Meant to be called rarely, before a rebalance. Where dispatch recorded the counts of all ranks, nothing is
        sent.
        """
        load = self._average if weighted else self._recent.sum(0).astype(np.float64)
        if comm is not None and not self._everywhere:
            load = np.sum(comm._exchange(load), axis=0)
        return torch.from_numpy(np.array(load))

    def advise(self, placement, *, seconds_per_row, bytes_per_expert, bytes_per_second, batches, comm=None, **options):
        """Plan a rebalance and weigh it: time saved over the next `batches` per layer against time to move weights.

        Parameters
        ----------
        placement : Placement
            In force.
        seconds_per_row : float
            Of the heaviest rank's work per routed row.
        bytes_per_expert, bytes_per_second : float
            Of one slot's weights, and of a rank's link.
        batches : int
            Until the next decision.
        comm : Communicator, optional
            As for load.
        options
            For rebalance: max_moves, num_groups, connected. Node count and slots stay.

        Returns
        -------
        Advice
            .pays where the gain exceeds the cost. A batch lasts as long as its heaviest rank; the moves into a rank share its link.

        Raises
        ------
        InvalidArgument
            As rebalance.
        """
        load = self.load(comm)
        planned = rebalance(load, num_replicas=placement.num_slots, num_nodes=placement.num_nodes, num_ranks=placement.num_ranks,
                            previous=placement, **options)
        weight = (1 - self._decay ** self.batches.astype(np.float64)) / (1 - self._decay)   # of all batches in the average
        per_batch = load / torch.from_numpy(np.maximum(weight, 1.0))[:, None]
        saved = (placement.rank_load(per_batch).max(1).values - planned.rank_load(per_batch).max(1).values).sum()
        into = torch.bincount(planned.moves[:, 1] // planned.slots_per_rank, minlength=planned.num_ranks)
        gain, cost = float(saved) * seconds_per_row * batches, float(into.max()) * bytes_per_expert / bytes_per_second
        return Advice(gain > cost, gain, cost, placement.balancedness(load), planned.balancedness(load), planned)
