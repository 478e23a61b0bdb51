"""prefetch: copies of a batch's hot experts within a number of bytes, and weights that follow."""

import random

import numpy as np
import pytest
import torch

import moecomm
from moecomm import InvalidArgument
from moecomm.balance import Placement, migrate, prefetch


def at_home(layers, ranks, nodes, own, spare):
    """Every expert once, in order; spare slots hold those of the next rank."""
    experts = ranks * own
    rows = [
        [*range(r * own, (r + 1) * own), *((r * own + own + j) % experts for j in range(spare))]
        for r in range(ranks)
    ]
    return Placement(torch.tensor(rows).view(1, -1).repeat(layers, 1), experts, ranks, nodes)


def skewed(layers, experts, seed):
    return np.round(np.random.default_rng(seed).lognormal(0, 1, (layers, experts)) * 1000)


def bytes_of(before, after, per_node, size):
    """(rail, node) by the definition: an expert crosses to each node that lacks it once, and goes on inside."""
    rail = node = 0
    for old, new in zip(before.physical_to_logical.tolist(), after.physical_to_logical.tolist()):
        per_rank = before.slots_per_rank
        nodes_of = {e: {s // per_rank // per_node for s, x in enumerate(old) if x == e} for e in set(old)}
        moved = {}
        for slot, (was, now) in enumerate(zip(old, new)):
            if was != now:
                moved.setdefault(now, []).append(slot // per_rank // per_node)
        for expert, to in moved.items():
            rail += len(set(to) - nodes_of[expert])
        node += sum(map(len, moved.values())) - sum(len(set(to) - nodes_of[e]) for e, to in moved.items())
    return rail * size, node * size


class SlowLayer:
    """The slow version of csrc/balance/prefetch.cpp: one layer."""

    copies = 0  # that the last answer moves

    def __init__(self, load: np.ndarray, table: np.ndarray, spare: int, per_node: int) -> None:
        self.load, self.table, self.spare = load, table, spare
        self.node = np.arange(len(table)) // per_node
        self.homes = table[:, :-spare]
        self.own = load[self.homes].sum(1)
        self.held = np.zeros((len(load), len(table)), dtype=bool)  # copies that are there already
        self.held[table[:, -spare:], np.arange(len(table))[:, None]] = True

    def lowest(self, most: int | None) -> np.ndarray:
        """The table [ranks, slots] of the lowest level that `most` copies reach."""
        low, high = self.own.mean(), self.own.max()
        best = self.reach(low, most)
        if best is None:
            best = [set() for _ in self.table]
            for _ in range(16):
                level = (low + high) / 2
                found = self.reach(level, most)
                if found is None:
                    low = level
                else:
                    high, best = level, found
        return self.place(best)

    def reach(self, level: float, most: int | None) -> list[set[int]] | None:
        """The copies of every rank with which none is above a level; None where that takes more than there may be."""
        room = level - self.own
        wanted: list[set[int]] = [set() for _ in room]
        free = np.full(len(room), self.spare)
        moved, tiny = 0, 1e-9 * max(self.own.mean(), 1e-300)
        for donor in np.argsort(-self.own, kind="stable"):
            excess = self.own[donor] - level
            hottest = self.homes[donor][np.argsort(-self.load[self.homes[donor]], kind="stable")]
            for expert in hottest.tolist():
                amount = self.load[expert]
                while excess > tiny and amount > tiny:
                    there, near = self.held[expert], self.node == self.node[donor]
                    able = (room > tiny) & (free > 0)
                    if not able.any():
                        return None
                    # What costs nothing first, then what stays in the node where it takes all; then the roomiest.
                    share = np.minimum(min(excess, amount), room)
                    worth = np.where(able, share * (1 + 0.5 * near) + (there * 2 * level), -1.0)
                    to = int(worth.argmax())
                    moved += not there[to]
                    if most is not None and moved > most:
                        return None
                    given = min(excess, amount, room[to])
                    wanted[to].add(expert)
                    free[to] -= 1
                    room[to] -= given
                    excess -= given
                    amount -= given
                if excess <= tiny:
                    break
            if excess > tiny:
                return None
        return wanted

    def place(self, wanted: list[set[int]]) -> np.ndarray:
        """The table with these copies: what is there already keeps its slot, and so does what nothing replaces."""
        self.copies = 0
        table: np.ndarray = self.table.copy()
        for row, copies in zip(table, wanted):
            slots = row[-self.spare :]
            new = sorted(copies - set(slots.tolist()))
            self.copies += len(new)
            places = [j for j in range(self.spare) if int(slots[j]) not in copies]
            for j, expert in zip(places, new):
                slots[j] = expert
        return table


@pytest.mark.parametrize(
    "ranks, nodes, own, spare", [(4, 2, 3, 1), (16, 4, 4, 2), (16, 1, 16, 3), (64, 8, 4, 2), (2, 1, 4, 2)]
)
def test_equals_the_slow_version(ranks, nodes, own, spare):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw = np.random.default_rng(seed)
    before = at_home(1, ranks, nodes, own, spare)
    for batch in range(12):
        load = skewed(1, ranks * own, seed + batch)
        if batch % 4 == 3:
            load[draw.random(load.shape) < 0.7] = 0
        budget = int(draw.choice([0, 1, ranks // 2, 10**6]))
        after = prefetch(load, before, spare=spare, bytes_per_expert=1, budget=budget)
        table = before.physical_to_logical.view(ranks, -1).numpy()
        want = SlowLayer(load[0], table, spare, ranks // nodes).lowest(budget)
        assert (after.physical_to_logical.view(ranks, -1).numpy() == want).all(), (batch, budget)
        before = after


@pytest.mark.parametrize("budget", [0, 7, 30, 10**9])
def test_copies_stay_within_the_budget_and_even_the_ranks(budget):
    seed, size = random.randrange(1 << 30), 3
    print("seed", seed)
    before, load = at_home(2, 16, 4, 4, 4), skewed(2, 64, seed)
    after = prefetch(load, before, spare=4, bytes_per_expert=size, budget=budget * size)
    table = after.physical_to_logical.view(2, 16, -1)
    assert (table[..., :4] == before.physical_to_logical.view(2, 16, -1)[..., :4]).all()
    assert (after.paid.rail_bytes, after.paid.node_bytes) == bytes_of(before, after, 4, size)
    assert after.paid.rail_bytes + after.paid.node_bytes <= budget * size == after.paid.budget
    assert (after.paid.unlimited <= after.paid.imbalance + 1e-3).all()
    assert (after.paid.imbalance <= after.paid.before + 1e-3).all()
    if budget == 0:
        assert after.moves.numel() == 0
    if budget == 10**9:
        assert (after.paid.imbalance < 1.001).all(), after.paid


def test_a_second_batch_uses_what_is_there():
    before, load = at_home(1, 16, 4, 4, 2), skewed(1, 64, 5)
    first = prefetch(load, before, spare=2, bytes_per_expert=1, budget=100)
    again = prefetch(load, first, spare=2, bytes_per_expert=1, budget=0)
    assert again.moves.numel() == 0 and again.version == first.version + 1
    assert (again.paid.imbalance <= first.paid.imbalance + 1e-3).all()


def test_weights_follow():
    before, load = at_home(2, 4, 2, 3, 2), skewed(2, 12, 3)
    after = prefetch(load, before, spare=2, bytes_per_expert=64, budget=1 << 20)
    assert after.moves.numel()

    def main(comm):
        mine = [row.view(4, -1)[comm.rank] for row in before.physical_to_logical]
        weights = [[slots[:, None].float().repeat(1, 16)] for slots in mine]
        brought = migrate(after, weights, comm).wait()
        for (held,), row in zip(brought, after.physical_to_logical):
            assert (held == row.view(4, -1)[comm.rank][:, None]).all()

    moecomm.run_local(main, 4, ranks_per_node=2)


@pytest.mark.parametrize(
    "name,more",
    [
        ("load", {"load": [[1.0] * 11]}),
        ("load", {"load": [[-1.0] * 12]}),
        ("spare", {"spare": 5}),
        ("budget", {"budget": -1}),
        ("bytes_per_expert", {"bytes_per_expert": [1, 2]}),
        ("previous", {"spare": 1}),
    ],
)
def test_wrong_arguments_are_named(name, more):
    arguments = {
        "load": [[1.0] * 12],
        "previous": at_home(1, 4, 2, 3, 2),
        "spare": 2,
        "bytes_per_expert": 1,
        "budget": 5,
        **more,
    }
    with pytest.raises(InvalidArgument, match=name):
        prefetch(arguments.pop("load"), arguments.pop("previous"), **arguments)
