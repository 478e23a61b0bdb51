"""Clusters: tables of hardware that the sim world and the planner take by name, in moecomm/tables/clusters/*.toml."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from .errors import InvalidArgument
from .sim import Hardware

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "tables" / "clusters"


@dataclass(frozen=True)
class Cluster:
    """A kind of cluster: its name, what it is in words, ranks that share memory, and rates and delays (sim.Hardware)."""

    name: str
    description: str
    ranks_per_node: int
    hardware: Hardware


def names():
    """Names that load() knows."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load(name):
    """A Cluster by name, or from a .toml file of the same form.

    Raises
    ------
    InvalidArgument
        There is no such table, or it holds something else than a cluster.
    """
    path = Path(name) if str(name).endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise InvalidArgument(f"cluster: got {str(name)!r}; expected one of {', '.join(names())}, or a .toml file", op="clusters")
    with open(path, "rb") as file:
        table = tomllib.load(file)
    known = {f.name for f in fields(Hardware)}
    hardware = table.get("hardware", {})
    wrong = sorted((set(table) - {"description", "ranks_per_node", "hardware"}) | (set(hardware) - known))
    if wrong or "ranks_per_node" not in table:
        raise InvalidArgument(f"cluster: {path.name} has {wrong or 'no ranks_per_node'}; expected description, ranks_per_node and a table [hardware] with "
                              f"some of {', '.join(sorted(known))}", op="clusters")
    return Cluster(path.stem, table.get("description", ""), table["ranks_per_node"], Hardware(**hardware))
