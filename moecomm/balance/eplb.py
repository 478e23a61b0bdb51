"""rebalance with the signature of DeepSeek's EPLB, which serving engines call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..checks import MOST_EXPERTS, integer
from .placement import rebalance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute a placement, with the arguments and results of DeepSeek's EPLB.

    Parameters
    ----------
    weight : Tensor [L, E]
        Load of the logical experts.
    num_replicas, num_groups, num_nodes, num_gpus : int
        Slots, groups, nodes and ranks. If num_nodes divides num_groups, each group stays in one node; else groups are
        ignored. A rank with more slots than it has distinct experts holds the most loaded ones twice. That improves
        no balance, and `Placement` refuses it.

    Returns
    -------
    (physical_to_logical [L, P], logical_to_physical [L, E, X] with -1, replica_count [L, E]), all int64

    Raises
    ------
    InvalidArgument
        As rebalance.
    """
    num_replicas, num_groups, num_nodes, ranks = (
        integer("rebalance", name, value, 1, MOST_EXPERTS)
        for name, value in dict(
            num_replicas=num_replicas, num_groups=num_groups, num_nodes=num_nodes, num_ranks=num_gpus
        ).items()
    )
    groups = num_groups if num_groups % num_nodes == 0 else 1
    experts = _experts(weight)
    distinct = experts // (num_nodes if groups > 1 else 1)
    slots = num_replicas // ranks
    fits = not distinct or slots <= distinct or num_replicas % ranks != 0
    p = rebalance(
        weight,
        num_replicas=num_replicas if fits else distinct * ranks,
        num_groups=groups,
        num_nodes=num_nodes,
        num_ranks=ranks,
    )
    if fits:
        return p.physical_to_logical, p.logical_to_physical, p.replica_count
    return _tables(_filled(p.physical_to_logical.view(-1, ranks, distinct), weight, slots), experts)


def _experts(weight: ArrayLike) -> int:
    """The number of columns, or 0 for anything but a matrix, which rebalance then refuses."""
    try:
        shape = np.shape(weight)
    except Exception:
        return 0
    return int(shape[1]) if len(shape) == 2 else 0


def _filled(held: torch.Tensor, weight: ArrayLike, slots: int) -> torch.Tensor:
    """Table [L, ranks * slots]: each rank's experts, then again those with the most load per replica on the rank."""
    load = torch.as_tensor(weight, dtype=torch.float64, device="cpu")
    load = load[:, None, :].expand(-1, held.shape[1], -1).gather(2, held)
    count = torch.ones(held.shape, dtype=torch.float64, device="cpu")
    out = [held]
    for _ in range(slots - held.shape[2]):
        most = (load / count).argmax(2, keepdim=True)
        out.append(held.gather(2, most))
        count.scatter_add_(2, most, torch.ones(most.shape, dtype=torch.float64, device="cpu"))
    return torch.cat(out, 2).flatten(1)


def _tables(physical: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layers = len(physical)
    count = torch.zeros((layers, experts), dtype=torch.int64, device="cpu")
    count.scatter_add_(1, physical, torch.ones_like(physical))
    order = physical.argsort(dim=1, stable=True)
    first = count.cumsum(1) - count
    expert = physical.gather(1, order)
    column = torch.arange(physical.shape[1], dtype=torch.int64, device="cpu").expand(layers, -1)
    column = column - first.gather(1, expert)
    logical = torch.full((layers, experts, int(count.max())), -1, dtype=torch.int64, device="cpu")
    layer = torch.arange(layers, dtype=torch.int64, device="cpu")[:, None]
    logical[layer, expert, column] = order
    return physical, logical, count
