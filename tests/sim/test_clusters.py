"""Cluster tables: all shipped ones load, and an invalid one gives an error."""

import re

import pytest

import moecomm
from moecomm import clusters
from moecomm.clusters import tomllib


@pytest.mark.parametrize("name", clusters.names())
def test_shipped(name):
    cluster = clusters.load(name)
    assert cluster.name == name and cluster.description and cluster.ranks_per_node in (8, 72)
    # The links inside a node are faster than the rail, which is the reason for two hops.
    assert cluster.hardware.node_rate > cluster.hardware.rail_rate > 0


def test_all_families_are_there():
    assert {"h800", "h100", "h200", "b200", "gb200", "efa"} <= set(clusters.names())


def test_wrong_tables(tmp_path):
    with pytest.raises(moecomm.InvalidArgument, match="is 'nonsuch'; expected one of b200"):
        clusters.load("nonsuch")
    file = tmp_path / "mine.toml"
    file.write_text("ranks_per_node = 4\n[hardware]\nrail_rat = 3.0\n")
    with pytest.raises(moecomm.InvalidArgument, match=r"rail_rat.*expected"):
        clusters.load(file)
    file.write_text("ranks_per_node = 4\n[hardware]\nrail_rate = 3.0\n")
    assert clusters.load(file).hardware.rail_rate == 3.0


@pytest.mark.parametrize("name", clusters.names())
def test_every_value_says_where_it_is_from(name):
    """A comment names the source of every value, or says that it is assumed or fitted."""
    above, found = "", set()
    for line in (clusters.FOLDER / f"{name}.toml").read_text().splitlines():
        if line.startswith("#"):
            above += line
            continue
        key, _, rest = line.partition(" = ")
        value, _, beside = rest.partition("#")
        if value.strip().replace(".", "", 1).isdigit():
            found.add(key)
            assert re.search(r"Source: \w|\bassumed\b|\bfitted\b", above + beside), (
                f"{name}.toml: {key} = {value}has no source, and is neither assumed nor fitted"
            )
        above = ""
    table = tomllib.loads((clusters.FOLDER / f"{name}.toml").read_text())
    assert found == {"ranks_per_node", *table["hardware"]}, "a value in a form that this test does not see"
