"""The verbs of a Domain on the virtual clock: results, times, and mutants that exploration finds."""

import random
from dataclasses import asdict

import numpy as np
import pytest

from moecomm import InvalidArgument
from moecomm._native import sim as native
from moecomm.sim import Hardware
from moecomm.sim.fabric import FabricCluster

MULTICAST, REDUCE, RING = range(3)
WORLDS = [(4, 2), (6, 2), (3, 1), (4, 4)]
PIECE, HEAP = 3000 * 4, 1 << 18
SRC, DST, SUM, OUT = 0, 60_032, 120_000, 180_032  # offsets in the heap, each of four pieces


def cluster(size, per_node, heap=HEAP):
    return native.DomainCluster(size, per_node, heap, asdict(Hardware()), True)


def long_sums(seed):
    """More sums in sequence at one root than a gateway has positions for."""
    return [(REDUCE, 0, [(root % 4, [0, 1, 2, 3], 0, 1 << 19, 40960, 12)]) for root in range(seed, seed + 2)]


def program(size, seed, rounds=4):
    """Multicasts and reductions with several roots, and rings between them; equal on all ranks."""
    r = random.Random(seed)
    calls = []
    for i in range(rounds):
        ranks = sorted(r.sample(range(size), r.randint(1, size)))
        root = r.randrange(size)
        calls.append((MULTICAST, 0, [(root, ranks, DST, SRC, PIECE, 4)]))
        calls.append(
            (
                REDUCE,
                0,
                [
                    (k, sorted(r.sample(range(size), max(1, size - 1))), DST, OUT, PIECE, 4)
                    for k in (root, (root + 1) % size)
                ][: 1 + i % 2],
            )
        )
        calls.append((RING, 0, [(1, [], SUM, SRC, PIECE, 2)]))
    return calls


def oracle(heaps, size, per_node, calls):
    """Return the heaps after the calls, from plain arrays; sources grow by one, as in the runtime."""

    def at(rank, begin, n):
        return heaps[rank][begin // 4 : begin // 4 + n]

    for verb, _, groups in calls:
        if verb == RING:
            (_, _, shared, own, piece, count), n = groups[0], groups[0][4] * groups[0][5] // 4
            news = [at(r, own, n).copy() for r in range(size)]
            for r in range(size):
                at((r + 1) % size, shared, n)[:] = news[r]
            for r in range(size):
                at(r, own, n)[:] += 1
            continue
        for root, ranks, shared, own, piece, count in groups:
            n = piece * count // 4
            if verb == MULTICAST:
                for r in ranks:
                    at(r, shared, n)[:] = at(root, own, n)
            else:
                at(root, own, n)[:] = np.sum([at(r, shared, n) for r in ranks], 0)
        for _, ranks, shared, _, piece, count in groups if verb == REDUCE else ():
            for r in ranks:
                at(r, shared, piece * count // 4)[:] += 1
        if verb == MULTICAST:
            for root, _, _, own, piece, count in groups:
                at(root, own, piece * count // 4)[:] += 1
    return heaps


@pytest.mark.parametrize("size,per_node", WORLDS)
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_heaps_are_the_oracles_calm_and_under_chaos(size, per_node, seed):
    c, calls = cluster(size, per_node), program(size, 5)
    c.run([])
    begin = [np.frombuffer(c.heap(r), dtype=np.float32).copy() for r in range(size)]
    times = c.run(calls, seed)
    assert all(code == "ok" and end >= start for call in times for start, end, code, _ in call)
    want = oracle(begin, size, per_node, calls)
    for r in range(size):
        got = np.frombuffer(c.heap(r), dtype=np.float32)
        assert np.array_equal(got, want[r]), f"rank {r}: first at {int((got != want[r]).argmax())}"


@pytest.mark.parametrize("size,per_node", WORLDS)
def test_no_schedule_delivers_anything_else(size, per_node):
    for seed in range(3):
        found = cluster(size, per_node).explore(program(size, seed, 2), "none", "none", 100, 60)
        assert not found["found"] and found["schedules"] == 60, found


def test_a_refusal_and_a_disagreement_reach_every_rank():
    calls = program(4, 1, 1)
    odd = [(verb, 1 + 3, groups) for verb, _, groups in calls[:1]]
    refused = [(verb, 129 + 1, groups) for verb, _, groups in calls[:1]]
    for seed in (None, 7, 8):
        times = cluster(4, 2).run([*odd, *refused, *calls], seed)
        assert [{(code, peer) for _, _, code, peer in call} for call in times[:2]] == [
            {("mismatch", 3)},
            {("refused", 1)},
        ]
        assert all(code == "ok" for call in times[2:] for _, _, code, _ in call)


MUTANTS = [
    ("signal_before_put", "none"),
    ("drop_put", "none"),
    ("skip_rank", "none"),
    ("skip_signal", "none"),
    ("skip_wait", "announce"),
    ("early_wait", "announce"),
    ("skip_wait", "forward"),
    ("early_wait", "forward"),
    ("skip_wait", "arrive"),
    ("skip_wait", "sum"),
    ("early_wait", "sum"),
    ("skip_wait", "done"),
    ("late_wait", "forward"),
    ("late_wait", "arrive"),
    ("skip_wait", "reduce"),
    ("early_wait", "reduce"),
    ("early_wait", "arrive"),
    ("early_wait", "done"),
]


@pytest.mark.parametrize("mutant,phase", MUTANTS)
def test_exploration_finds_every_mutant(mutant, phase):
    tried = 0
    for seed in range(12):
        sums = phase == "reduce"
        c, calls = cluster(4, 2, 1 << 20 if sums else HEAP), long_sums(seed) if sums else program(4, seed)
        found = c.explore(calls, mutant, phase, 0, 40)
        tried += found["schedules"]
        if found["found"]:
            return
    pytest.fail(f"{mutant} {phase} was not found in {tried} schedules")


def test_a_multicast_costs_one_copy_per_node():
    c = FabricCluster(32, ranks_per_node=8)
    size = 1 << 20
    one, all_of_them = c.multicast([8], size), c.multicast(range(32), size)
    assert (one.rail_bytes, one.node_bytes) == (size, 0)
    assert (all_of_them.rail_bytes, all_of_them.node_bytes) == (3 * size, 28 * size)
    flat = 24 * size / (Hardware().rail_rate * 1e9)
    assert one.seconds < all_of_them.seconds < flat, "24 copies over one rail take longer"
    sums = c.reduce(range(32), size)
    assert sums.rail_bytes == 3 * size and sums.seconds > 0


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda c: c.multicast([4], 64), "ranks is 4"),
        (lambda c: c.multicast([], 64), "at least one rank"),
        (lambda c: c.reduce([1, 1], 64), "distinct"),
        (lambda c: c.reduce([1], 64, root=9), "root is 9"),
        (lambda c: c.multicast([1], 0), "nbytes is 0"),
        (lambda c: FabricCluster(4, ranks_per_node=3), "a divisor of size"),
    ],
)
def test_what_is_wrong_is_named(call, text):
    with pytest.raises(InvalidArgument, match=text):
        call(FabricCluster(4, ranks_per_node=2))
