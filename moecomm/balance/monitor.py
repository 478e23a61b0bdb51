"""LoadMonitor: keeps the picks that dispatch has counted, and estimates whether a rebalance saves time."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checks import MOST_EXPERTS, flag, integer, integers, number, require
from ..fabric import Domain
from .placement import Placement, rebalance
from .totals import sum_over_ranks

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..communicator import Communicator


@dataclass(frozen=True)
class Advice:
    """Estimated benefit of a rebalance.

    Attributes
    ----------
    pays : bool
        Whether the gain exceeds the cost.
    gain, cost : float
        Seconds saved over the next batches, and seconds to move the weights.
    before, after : float
        Balancedness of the current and of the new placement.
    placement : Placement
        The new placement.
    """

    pays: bool
    gain: float
    cost: float
    before: float
    after: float
    placement: Placement


class LoadMonitor:
    """Statistics of the picks per layer and logical expert. dispatch records them: Buffer(..., monitor=monitor).

    Keeps the last `window` batches of every layer, and a weighted average in which the weight of a batch halves every
    `half_life` batches. Counts the picks of this rank's tokens, or of all ranks' tokens if dispatch exchanges the
    counts anyway.

    Parameters
    ----------
    num_layers, num_experts : int
    window : int
        Number of batches to keep, per layer.
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
        self._decay = 0.5 ** min(1.0 / half_life, 1074.0)  # 2**-1074 is the smallest float64 above 0
        try:
            self.reset()
        except (MemoryError, ValueError):  # NumPy raises ValueError if the size overflows
            require(
                False,
                op,
                "window",
                window,
                f"{layers} layers x {experts} experts x window counts to fit into memory; use a smaller window",
            )

    def reset(self) -> None:
        """Delete all recorded counts."""
        layers, experts = self.shape
        self._recent = np.zeros((self.window, layers, experts), dtype=np.int64)
        self._average = np.zeros(self.shape)
        self._everywhere: bool | None = None
        self.batches = np.zeros(layers, dtype=np.int64)  # batches recorded, per layer

    def record(self, layer: int, counts: ArrayLike, *, everywhere: bool = False) -> None:
        """Add the picks of one batch. Called by dispatch.

        Parameters
        ----------
        layer : int
        counts : array [E] of integers >= 0
            Picks per logical expert.
        everywhere : bool
            The counts include the picks of all ranks, not of this rank alone.

        Raises
        ------
        InvalidArgument
            The layer does not exist, counts is not an array [E] of integers >= 0, or `everywhere` differs from
            earlier calls since the last reset.
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
            f"a count >= 0 for each of {self.shape[1]} experts",
        )
        require(
            self._everywhere in (None, everywhere),
            "LoadMonitor",
            "everywhere",
            everywhere,
            f"{self._everywhere} as in earlier calls (or call reset() first)",
        )
        self._everywhere = everywhere
        self._recent[self.batches[layer] % self.window, layer] = picks
        self._average[layer] = self._average[layer] * self._decay + picks
        self.batches[layer] += 1

    def copy(self) -> LoadMonitor:
        """Return a monitor with the present counts, which later dispatches do not change.

        Make the copy between two batches, on all ranks: there the counts that dispatch has exchanged are equal on all
        ranks. A thread can then plan with the copy while layers run.
        """
        other = copy.copy(self)
        for name in ("_recent", "_average", "batches"):
            setattr(other, name, getattr(self, name).copy())
        return other

    def load(self, comm: Communicator | Domain | None = None, *, weighted: bool = True) -> torch.Tensor:
        """Return the load float64 [L, E]: the weighted average, or the sum over the window.

        With comm the call is collective and sums over its ranks. Call it rarely, between two batches and before a
        rebalance. If dispatch recorded the counts of all ranks, nothing is sent: they are equal on all ranks.

        Parameters
        ----------
        comm : Communicator or Domain, optional
            A Communicator gathers the counts of all ranks over its bootstrap connections. A Domain of this
            Communicator sums them on the way: every rank sums a part, and each node sends one row per part. It needs
            free memory for two tables of L * E numbers. It is the better choice with many ranks.
        weighted : bool
            Return the weighted average, else the sum over the window.

        Raises
        ------
        InvalidArgument
            comm is neither a Communicator nor a Domain.
        ConfigMismatch
            Ranks have monitors of different shapes, or (with a Domain) ask for different sums.
        CapacityExceeded
            The Domain has not enough free memory.
        """
        weighted = flag("load", "weighted", weighted)
        require(
            comm is None or hasattr(comm, "ranks_per_node"),
            "load",
            "comm",
            comm,
            "a Communicator, a Domain, or None",
        )
        load = self._average if weighted else self._recent.sum(0).astype(np.float64)
        if isinstance(comm, Domain) and not self._everywhere:
            layers, experts = self.shape
            same = {"layers": layers, "experts": experts, "weighted": int(weighted)}
            return sum_over_ranks(comm, torch.from_numpy(load), same)
        if comm is not None and not isinstance(comm, Domain) and not self._everywhere:
            everyone = comm.collective.exchange(
                [list(load.shape), np.ascontiguousarray(load).tobytes()], "load"
            )
            comm.collective.require_equal("load", [{"layers and experts": shape} for shape, _ in everyone])
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
        comm: Communicator | Domain | None = None,
        **options: Any,
    ) -> Advice:
        """Compute a rebalance and compare the time it saves with the time to move the weights.

        The model: a batch takes as long as its heaviest rank, and all moves into a rank share its link.

        Parameters
        ----------
        placement : Placement
            The current placement.
        seconds_per_row : float
            Time that a rank needs per row, in seconds.
        bytes_per_expert, bytes_per_second : float
            Bytes of the weights of one slot, and bandwidth of a rank's link.
        batches : int
            Number of batches per layer until the next decision.
        comm : Communicator or Domain, optional
            As for load.
        options
            max_moves, num_groups and connected of rebalance. The numbers of nodes and slots do not change.

        Returns
        -------
        Advice
            .pays is True if the gain exceeds the cost.

        Raises
        ------
        InvalidArgument
            An argument is not a number, or the placement has another shape. Also as rebalance.
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
                f"a placement of {self.shape[0]} layers and {self.shape[1]} experts",
            )
            unknown = sorted(set(options) - {"max_moves", "num_groups", "connected"})
            require(not unknown, op, "options", unknown, "some of max_moves, num_groups, connected")
            return [
                number(op, "seconds_per_row", seconds_per_row),
                number(op, "bytes_per_expert", bytes_per_expert),
                number(op, "bytes_per_second", bytes_per_second, positive=True),
                number(op, "batches", batches),
            ]

        require(
            comm is None or hasattr(comm, "ranks_per_node"),
            op,
            "comm",
            comm,
            "a Communicator, a Domain, or None",
        )
        members = comm.comm if isinstance(comm, Domain) else comm
        # An argument that is wrong on one rank raises on all ranks, so no rank waits for a load that never comes.
        given = (
            checked()
            if members is None or self._everywhere
            else members.collective.everywhere(op, checked)[members.rank]
        )
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
        # Total weight of all batches in the average.
        weight = past if self._decay == 1.0 else (1 - self._decay**past) / (1 - self._decay)
        per_batch = load / torch.from_numpy(np.maximum(weight, 1.0))[:, None]
        saved = (
            placement.rank_load(per_batch).max(1).values - planned.rank_load(per_batch).max(1).values
        ).sum()
        into = torch.bincount(planned.moves[:, 1] // planned.slots_per_rank, minlength=planned.num_ranks)
        gain, cost = float(saved) * per_row * batches, float(into.max()) * moved / rate
        return Advice(
            gain > cost, gain, cost, placement.balancedness(load), planned.balancedness(load), planned
        )
