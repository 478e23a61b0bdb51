"""How a group's ranks are spread over nodes."""

from __future__ import annotations

from ._world import world_of


def get_physical_domain_size(group):
    """(nodes, ranks per node) of a group. The first time collective."""
    world = world_of(group)
    return world.num_nodes, world.size // world.num_nodes


def get_logical_domain_size(group, allow_hybrid_mode=True):
    """(nodes, ranks per node) of a group, or (1, ranks) without hybrid mode. The first time collective."""
    return get_physical_domain_size(group) if allow_hybrid_mode else (1, world_of(group).size)
