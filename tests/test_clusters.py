"""Cluster tables: every shipped one loads, and a wrong one says what is wrong."""

import pytest

import moecomm
from moecomm import clusters


@pytest.mark.parametrize("name", clusters.names())
def test_shipped(name):
    cluster = clusters.load(name)
    assert cluster.name == name and cluster.description and cluster.ranks_per_node in (8, 72)
    # A node's links are faster than the rail: what the two hops are for.
    assert cluster.hardware.node_rate > cluster.hardware.rail_rate > 0


def test_all_families_are_there():
    assert {"h800", "h100", "h200", "b200", "gb200", "efa"} <= set(clusters.names())


def test_wrong_tables(tmp_path):
    with pytest.raises(moecomm.InvalidArgument, match="got 'nonsuch'; expected one of b200"):
        clusters.load("nonsuch")
    file = tmp_path / "mine.toml"
    file.write_text("ranks_per_node = 4\n[hardware]\nrail_rat = 3.0\n")
    with pytest.raises(moecomm.InvalidArgument, match="rail_rat.*expected"):
        clusters.load(file)
    file.write_text("ranks_per_node = 4\n[hardware]\nrail_rate = 3.0\n")
    assert clusters.load(file).hardware.rail_rate == 3.0
