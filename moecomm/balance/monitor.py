"""LoadMonitor: what dispatch has counted, and whether moving experts would pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checks import MOST_EXPERTS, flag, integer, integers, number, require
from .placement import Placement, rebalance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..communicator import Communicator


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

    def __init__(
        self, num_layers: int, num_experts: int, *, window: int = 64, half_life: float = 64.0
    ) -> None:
        op = "LoadMonitor"
        layers, experts = (
            integer(op, "num_layers", num_layers, 1, 1 << 20),
            integer(op, "num_experts", num_experts, 1, MOST_EXPERTS),
        )
        self.shape, self.window = (layers, experts), integer(op, "window", window, 1, 1 << 20)
        half_life = number(op, "half_life", half_life, positive=True)
        self._decay = 0.5 ** min(1.0 / half_life, 1074.0)  # beyond that it is 0
        try:
            self.reset()
        except (MemoryError, ValueError):  # NumPy's, where the size is no size at all
            require(
                False,
                op,
                "window",
                window,
                f"a history of {layers} layers x {experts} experts x window that memory holds",
            )

    def reset(self) -> None:
        """Forget everything."""
        layers, experts = self.shape
        self._recent = np.zeros((self.window, layers, experts), dtype=np.int64)
        self._average = np.zeros(self.shape)
        self._everywhere: bool | None = None
        self.batches = np.zeros(layers, dtype=np.int64)  # recorded, per layer

    def record(self, layer: int, counts: ArrayLike, *, everywhere: bool = False) -> None:
        """Add one batch's picks, int [E]; everywhere: of all ranks, else of this one. Called by dispatch.

        Raises
        ------
        InvalidArgument
            There is no such layer, the counts are no picks [E], or both kinds are mixed since the last reset.
        """
        layer, everywhere = (
            integer("LoadMonitor", "layer", layer, 0, self.shape[0] - 1),
            flag("LoadMonitor", "everywhere", everywhere),
        )
        picks: np.ndarray = integers("LoadMonitor", "counts", counts)
        require(
            picks.shape == self.shape[1:] and picks.min() >= 0,
            "LoadMonitor",
            "counts",
            picks,
            f"picks >= 0 of {self.shape[1]} experts",
        )
        require(
            self._everywhere in (None, everywhere),
            "LoadMonitor",
            "everywhere",
            everywhere,
            "the same kind of counts since the last reset",
        )
        self._everywhere = everywhere
        self._recent[self.batches[layer] % self.window, layer] = picks
        self._average[layer] = self._average[layer] * self._decay + picks
        self.batches[layer] += 1

    def load(self, comm: Communicator | None = None, *, weighted: bool = True) -> torch.Tensor:
        """Load float64 [L, E]: the weighted average, or the sum of the window. Collective with comm: summed over its ranks.

        Meant to be called rarely, before a rebalance. Where dispatch recorded the counts of all ranks, nothing is
        sent.

        Raises
        ------
        InvalidArgument
            comm is no Communicator.
        """
        weighted = flag("load", "weighted", weighted)
        require(
            comm is None or hasattr(comm, "ranks_per_node"), "load", "comm", comm, "a Communicator, or None"
        )
        load = self._average if weighted else self._recent.sum(0).astype(np.float64)
        if comm is not None and not self._everywhere:
            everyone = comm._exchange([list(load.shape), np.ascontiguousarray(load).tobytes()], "load")
            comm._require_equal("load", [{"layers and experts": shape} for shape, _ in everyone])
            load = np.sum(
                [np.frombuffer(data, dtype=np.float64).reshape(load.shape) for _, data in everyone], axis=0
            )
        return torch.from_numpy(np.array(load))

    def advise(
        self,
        placement: Placement,
        *,
        seconds_per_row: float,
        bytes_per_expert: float,
        bytes_per_second: float,
        batches: float,
        comm: Communicator | None = None,
        **options: Any,
    ) -> Advice:
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
            A number is none, the placement is of another shape, or as rebalance.
        """
        op = "advise"

        def checked() -> Any:
            require(
                isinstance(placement, Placement), op, "placement", placement, "a moecomm.balance.Placement"
            )
            require(
                (placement.num_layers, placement.num_experts) == self.shape,
                op,
                "placement",
                placement,
                f"one of {self.shape[0]} layers and {self.shape[1]} experts",
            )
            unknown = sorted(set(options) - {"max_moves", "num_groups", "connected"})
            require(not unknown, op, "options", unknown, "some of max_moves, num_groups, connected")
            return [
                number(op, "seconds_per_row", seconds_per_row),
                number(op, "bytes_per_expert", bytes_per_expert),
                number(op, "bytes_per_second", bytes_per_second, positive=True),
                number(op, "batches", batches),
            ]

        require(comm is None or hasattr(comm, "ranks_per_node"), op, "comm", comm, "a Communicator, or None")
        # What is wrong on one rank is raised on all of them: nobody waits for loads that do not come.
        given = checked() if comm is None or self._everywhere else comm._everywhere(op, checked)[comm.rank]
        per_row, moved, rate, batches = given
        load = self.load(comm)
        planned = rebalance(
            load,
            num_replicas=placement.num_slots,
            num_nodes=placement.num_nodes,
            num_ranks=placement.num_ranks,
            previous=placement,
            **options,
        )
        past = self.batches.astype(np.float64)
        weight = (
            past if self._decay == 1.0 else (1 - self._decay**past) / (1 - self._decay)
        )  # of all batches in the average
        per_batch = load / torch.from_numpy(np.maximum(weight, 1.0))[:, None]
        saved = (
            placement.rank_load(per_batch).max(1).values - planned.rank_load(per_batch).max(1).values
        ).sum()
        into = torch.bincount(planned.moves[:, 1] // planned.slots_per_rank, minlength=planned.num_ranks)
        gain, cost = float(saved) * per_row * batches, float(into.max()) * moved / rate
        return Advice(
            gain > cost, gain, cost, placement.balancedness(load), planned.balancedness(load), planned
        )
