"""Numbers of nodes and of ranks per node of a group."""

from __future__ import annotations

from typing import Any

from ._world import world_of


def get_physical_domain_size(group: Any) -> Any:
    """Return (nodes, ranks per node) of a group. The first call for a group is collective."""
    world = world_of(group)
    return world.num_nodes, world.size // world.num_nodes


def get_logical_domain_size(group: Any, allow_hybrid_mode: Any = True) -> Any:
    """Return (nodes, ranks per node), or (1, ranks) without hybrid mode. The first call for a group is collective."""
    return get_physical_domain_size(group) if allow_hybrid_mode else (1, world_of(group).size)
