"""A call costs what it moves, whatever the Buffer has room for; and memory follows the shape."""

from pathlib import Path

import pytest
from worlds import random_world

import moecomm

HIDDEN, EXPERTS, TOP_K, TOKENS = 512, 8, 4, 4


def committed():
    """Bytes of this process's windows that have pages."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            total += inside * int(line.split()[1]) * 1024
        elif "-" in line.split()[0]:
            inside = "memfd:moecomm" in line
    return total


def round_trip(buf, world, rank):
    """What a dispatch and a combine of the world have counted."""
    xs, ids, weights = world
    buf.stats()
    out = buf.dispatch(xs[rank], ids[rank], weights[rank])
    buf.combine(out.x, out.handle, topk_weights=out.topk_weights)
    return buf.stats()


@pytest.mark.parametrize("per_node", [4, 2])
def test_counters_do_not_know_the_maximum(per_node):
    """The same rows, bytes and exchanges with room for 4 tokens and for 8192."""
    world = random_world(4, TOKENS, HIDDEN, EXPERTS, TOP_K, seed=per_node)

    def run(comm):
        counted = []
        for most in (TOKENS, 8192):
            buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=most)
            counted.append(round_trip(buf, world, comm.rank))
        return counted

    for few, many in moecomm.run_local(run, 4, ranks_per_node=per_node):
        assert few == many and few["node"]["logical_rows"] > 0


def test_committed_memory_follows_the_shape(monkeypatch):
    """Pages at start are in proportion to the tokens; a small call touches few more. Without a shape there are none."""
    world = random_world(1, TOKENS, HIDDEN, EXPERTS, TOP_K, seed=1)
    comm = moecomm.Communicator("alone")
    row = 2 * HIDDEN

    def start(**shape):
        before = committed()
        buf = moecomm.Buffer(comm, **shape)
        return buf, committed() - before

    shape = dict(hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K)
    lazy, nothing = start()
    small, few = start(**shape, max_tokens=64)
    large, many = start(**shape, max_tokens=2048)
    assert nothing == 0
    usual = 4 * TOP_K * row  # per token: two dispatches and their experts' outputs
    assert few < 64 * usual + (8 << 20)  # a huge page per memory, perhaps
    assert many > few and many < 2048 * 2 * usual
    assert many < large.num_bytes
    monkeypatch.setenv("MOECOMM_POPULATE_BYTES", "0")
    cold, least = start(**shape, max_tokens=2047)
    assert least < many / 2
    before = committed()
    assert round_trip(cold, world, 0)["calls"] == 2
    assert committed() - before < cold.num_bytes / 4
    del lazy, small
