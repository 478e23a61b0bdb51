"""Rebalancing within a budget of bytes: choose per layer how many slots move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .multicast import grouped

if TYPE_CHECKING:
    from .placement import Placement


@dataclass(frozen=True)
class Paid:
    """Costs and benefits of the moves of a placement.

    Attributes
    ----------
    rail_bytes, node_bytes : int
        Bytes that the migration moves between nodes and inside nodes, over all ranks. An expert crosses to each node
        at most once.
    budget : int
        Bytes that were allowed.
    imbalance : Tensor float64 [L]
        Load of the heaviest rank divided by the mean, per layer.
    unlimited : Tensor float64 [L]
        The same for the placement without a budget.
    before : Tensor float64 [L]
        The same for the current placement.
    """

    rail_bytes: int
    node_bytes: int
    budget: int
    imbalance: torch.Tensor
    unlimited: torch.Tensor
    before: torch.Tensor


@dataclass(frozen=True)
class _Option:
    """One layer of one candidate placement."""

    bytes: int
    heaviest: float
    candidate: int


def moved_bytes(placement: Placement, ranks_per_node: int, sizes: Sequence[int]) -> torch.Tensor:
    """Bytes int64 [L, 2] that the moves of a placement send over the rail and inside nodes."""
    moves: list[list[tuple[int, int, int]]] = [[] for _ in sizes]
    for layer, slot, expert, source in placement.moves.tolist():
        moves[layer].append((slot, expert, source))
    found = torch.zeros((len(sizes), 2), dtype=torch.int64, device="cpu")
    for layer, size in enumerate(sizes):
        for group in grouped(moves[layer], placement.slots_per_rank, ranks_per_node):
            nodes = {rank // ranks_per_node for rank in group.to} - {group.root // ranks_per_node}
            found[layer, 0] += len(nodes) * size
            found[layer, 1] += (len(group.to) - len(nodes)) * size
    return found


def within_budget(
    load: torch.Tensor,
    previous: Placement,
    solve: Callable[[int | None], Placement],
    sizes: Sequence[int],
    budget: int,
    max_moves: int | None,
) -> tuple[torch.Tensor, Paid]:
    """Choose for every layer one of several candidate placements with few to many moves: (table int64 [L, P], Paid).

    Greedy: the next move is the one that reduces the load of the heaviest rank most per byte, as long as it fits.
    """
    unlimited = solve(max_moves)
    per_node = unlimited.num_ranks // unlimited.num_nodes
    limits = [
        k
        for k in (1, 2, 4, 8, 16, 32)
        if k < unlimited.slots_per_rank and (max_moves is None or k < max_moves)
    ]
    candidates = [previous, *(solve(k) for k in limits), unlimited]
    heaviest = torch.stack([c.rank_load(load).max(1).values for c in candidates])
    costs = [torch.zeros((len(sizes), 2), dtype=torch.int64, device="cpu")]
    costs += [moved_bytes(c, per_node, sizes) for c in candidates[1:]]
    options = [_options(heaviest[:, i], [int(c[i].sum()) for c in costs]) for i in range(len(sizes))]
    chosen = _choose(options, budget)
    table = torch.stack([candidates[o.candidate].physical_to_logical[i] for i, o in enumerate(chosen)])
    mean = load.sum(1).clamp_min(1e-300) / unlimited.num_ranks
    picked = [o.candidate for o in chosen]
    rail, node = (sum(int(costs[c][i, hop]) for i, c in enumerate(picked)) for hop in (0, 1))
    now = torch.tensor([o.heaviest for o in chosen], dtype=torch.float64, device="cpu")
    return table, Paid(rail, node, budget, now / mean, heaviest[-1] / mean, heaviest[0] / mean)


def _options(heaviest: torch.Tensor, costs: Sequence[int]) -> list[_Option]:
    """Options of one layer by ascending bytes and descending heaviest load. The first moves nothing."""
    every = sorted((c, float(h), i) for i, (h, c) in enumerate(zip(heaviest.tolist(), costs)))
    kept = [_Option(0, float(heaviest[0]), 0)]
    for cost, load, candidate in every:
        if load < kept[-1].heaviest:
            kept.append(_Option(cost, load, candidate))
    return kept


def _choose(options: Sequence[list[_Option]], budget: int) -> list[_Option]:
    """Choose one option per layer, so that their bytes fit into the budget."""
    if sum(o[-1].bytes for o in options) <= budget:
        return [o[-1] for o in options]
    chosen = [o[0] for o in options]
    left = budget
    while True:
        best: tuple[float, int, _Option] | None = None
        for layer, candidates in enumerate(options):
            for o in candidates:
                more, less = o.bytes - chosen[layer].bytes, chosen[layer].heaviest - o.heaviest
                if less > 0 and more <= left:
                    worth = less / max(more, 1)
                    if best is None or worth > best[0]:
                        best = worth, layer, o
        if best is None:
            return chosen
        _, layer, option = best
        left -= option.bytes - chosen[layer].bytes
        chosen[layer] = option
