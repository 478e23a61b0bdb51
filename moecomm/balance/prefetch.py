"""Balance for one batch: copies of its hot experts go to spare slots before its dispatch, within a number of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._native import balance as native
from ..checks import integer, require
from .budget import Paid, moved_bytes
from .placement import Placement, finite_load, sizes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike


def prefetch(
    load: ArrayLike,
    previous: Placement,
    *,
    spare: int,
    bytes_per_expert: int | Sequence[int],
    budget: int,
) -> Placement:
    """A placement for one batch: every expert stays at home, and spare slots get copies of those that are hot.

    With `replicas="optimal"` a dispatch then splits the batch's tokens so that the ranks are even, where the copies
    allow it. migrate() of the result brings the copies, by multicast. Deterministic: equal arguments give equal
    placements.

    Parameters
    ----------
    load : array or Tensor [L, E]
        The batch's picks per layer and expert, of all ranks.
    previous : Placement
        In force now. The first slots of its ranks hold every expert once. Copies that it has in spare slots cost
        nothing.
    spare : int
        Slots per rank that copies may take: its last ones.
    bytes_per_expert : int, or a sequence of L ints
        Bytes of one expert's weights.
    budget : int
        Most bytes that the copies may move over all links. Where it suffices, all ranks become even; else the level of
        the heaviest rank is the lowest that this planner finds within it. What a layer leaves goes to later ones.

    Returns
    -------
    Placement
        .paid says what its copies cost, and the imbalance (heaviest rank over the mean, with the best split) before,
        with this budget, and with none.

    Raises
    ------
    InvalidArgument
        A shape or a number does not fit, or the first slots do not hold every expert once.

    Source: MoonEP and UltraEP (arXiv 2606.04101), which fetch hot experts per batch inside one NVLink domain.
    """
    op = "prefetch"
    load = finite_load(op, "load", load)
    require(isinstance(previous, Placement), op, "previous", previous, "a Placement")
    layers, experts = previous.num_layers, previous.num_experts
    require(load.shape == (layers, experts), op, "load", list(load.shape), f"[L, E] = {[layers, experts]}")
    spare = integer(op, "spare", spare, 1, previous.slots_per_rank - 1)
    budget = integer(op, "budget", budget, 0, (1 << 62) - 1)
    sizes = sizes_of(op, bytes_per_expert, layers)
    table = previous.physical_to_logical.view(layers, previous.num_ranks, -1)
    homes = table[..., :-spare].reshape(layers, -1)
    every = torch.arange(experts, dtype=torch.int64, device="cpu").expand(layers, experts)
    once = homes.shape[1] == experts and bool((homes.sort(1).values == every).all())
    require(
        once, op, "previous", previous, f"one whose ranks hold every expert once in all but {spare} slots"
    )

    slots: np.ndarray = table.to(torch.int32).contiguous().numpy()

    def planned(bound: int | None) -> Placement:
        left, made = bound, np.empty_like(slots)
        for i in range(layers):
            most = -1 if left is None else left // (layers - i) // max(sizes[i], 1)
            copies: Any = native.prefetch(load[i], slots[i], previous.num_nodes, spare, most, made[i])
            if left is not None:
                left -= copies * sizes[i]
        return Placement(
            torch.from_numpy(made.reshape(layers, -1).astype(np.int64)),
            experts,
            previous.num_ranks,
            previous.num_nodes,
            previous.version + 1,
            previous,
        )

    result, best = planned(budget), planned(None)
    rail, node = moved_bytes(result, previous.num_ranks // previous.num_nodes, sizes).sum(0).tolist()
    paid = Paid(rail, node, budget, *(_imbalance(load, p) for p in (result, best, previous)))
    return Placement(
        result.physical_to_logical,
        experts,
        previous.num_ranks,
        previous.num_nodes,
        result.version,
        previous,
        paid=paid,
    )


def _imbalance(load: np.ndarray, placement: Placement) -> torch.Tensor:
    """Heaviest rank over the mean with the best split, float64 [L]."""
    found = []
    for row, slots in zip(load, placement.physical_to_logical.numpy()):
        r = native.Replicas(
            np.ascontiguousarray(slots, dtype=np.int32),
            placement.num_experts,
            placement.num_ranks,
            placement.num_nodes,
        )
        mean = max(row.sum() / placement.num_ranks, 1e-300)
        heaviest: Any = r.split(row, np.empty(r.count))
        found.append(float(heaviest) / mean if row.any() else 1.0)
    return torch.tensor(found, dtype=torch.float64, device="cpu")
