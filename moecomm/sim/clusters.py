"""Hardware tables of clusters, by name, for the sim world and the planner. Files: moecomm/tables/clusters/*.toml."""

from __future__ import annotations

from typing import Any

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from ..tracing.archives import read_text, refuse
from ..checks import path as _path
from ..checks import spelled
from ..errors import InvalidArgument
from .world import Hardware

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

FOLDER = Path(__file__).parents[1] / "tables" / "clusters"


@dataclass(frozen=True)
class Cluster:
    """A type of cluster: name, description, ranks per node, and the rates and delays of its links (sim.Hardware)."""

    name: str
    description: str
    ranks_per_node: int
    hardware: Hardware


def names() -> Any:
    """Names of the tables that load() finds."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load(name: str) -> Any:
    """Load a Cluster by name, or from a .toml file of the same format.

    Raises
    ------
    InvalidArgument
        The table does not exist or does not describe a cluster.
    """
    path = Path(_path("cluster", "name", name))
    path = path if path.name.endswith(".toml") else FOLDER / f"{name}.toml"
    if path.parent == FOLDER and path.stem not in names():
        raise InvalidArgument(
            f"cluster is {spelled(name)}; expected one of {', '.join(names())}, or a .toml file",
            op="clusters",
        )
    text = read_text("cluster", path)
    try:
        table = tomllib.loads(text)
    # ValueError covers TOMLDecodeError and numbers that are too long for Python.
    except (ValueError, RecursionError) as error:
        refuse(
            "cluster",
            path,
            "file",
            f"is not TOML ({type(error).__name__}: {error})",
            "a table as in moecomm/tables/clusters",
        )
    hardware = table.get("hardware", {})
    known = {f.name for f in fields(Hardware)}
    if not isinstance(hardware, dict):
        refuse("cluster", path, "hardware", f"is {spelled(hardware)}", "a table [hardware]")
    wrong = sorted((set(table) - {"description", "ranks_per_node", "hardware"}) | (set(hardware) - known))
    if wrong or "ranks_per_node" not in table:
        refuse(
            "cluster",
            path,
            "file",
            f"has {spelled(wrong) if wrong else 'no ranks_per_node'}",
            f"description, ranks_per_node and a table [hardware] with some of {', '.join(sorted(known))}",
        )
    per_node, description = table["ranks_per_node"], table.get("description", "")
    if not isinstance(per_node, int) or isinstance(per_node, bool) or not 1 <= per_node <= 65535:
        refuse("cluster", path, "ranks_per_node", f"is {spelled(per_node)}", "an int in 1..65535")
    if not isinstance(description, str):
        refuse("cluster", path, "description", f"is {spelled(description)}", "a string")
    try:
        return Cluster(path.stem, description, per_node, Hardware(**hardware))
    except InvalidArgument as error:
        refuse("cluster", path, "hardware", f"is invalid ({error})", "values that sim.Hardware accepts")
