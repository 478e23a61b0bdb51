"""Parts of the random programs of exploration: refusals, other calls, deaths, choices of replicas."""

from __future__ import annotations

from typing import Any

import random

import torch

from ..balance import Placement
from . import MODES, Choosing


def refuse(calls: Any) -> Any:
    """With some probability, let some ranks refuse the last call. Returns whether they do."""
    r, size = calls.refusals, calls.world.size
    refused = r.random() < 0.12
    if refused:
        calls.program.refuse(r.sample(range(size), r.choice([1, 1, 1, r.randint(1, size), size])))
    return refused


def combine_again(calls: Any, weights: Any) -> None:
    """With some probability, combine the last decode dispatch further times, with other rows."""
    p, r = calls.program, calls.again
    for number in range(r.choice([0, 0, 1, 1, 2])):
        p.decode_combine(weights, flip=4 + number, wire=r.choice([None, None, "fp8", "logfmt10"]))
        if refuse(calls):
            return
        p.decode_hook()


def stray(calls: Any, xs: Any, ids: Any) -> None:
    """End the program with a rank that makes another call than its peers. No rank of another node can continue."""
    calls.program.dispatch(ids, xs=[x.new_zeros(x.shape, dtype=torch.bfloat16) for x in xs])
    if calls.refusals.random() < 0.5:
        calls.program.combine()
    calls.program.refuse([calls.refusals.randrange(calls.world.size)], strays=True)


def placement(world: Any, r: random.Random) -> Any:
    """Draw a Placement. Experts are dealt to slots in turn, so no rank holds an expert twice.

    Their number is between the minimum that a rank or a token needs and three quarters of the slots.
    """
    slots, fewest = world.size * world.experts_per_rank, max(world.top_k, world.experts_per_rank)
    experts = r.randint(fewest, max(fewest, slots * 3 // 4))
    deck = r.sample(range(experts), experts)
    table = [deck[slot % experts] for slot in range(slots)]
    return Placement(torch.tensor([table], dtype=torch.int64, device="cpu"), experts, world.size, world.nodes)


def choose(calls: Any, r: random.Random, ids: Any) -> Any:
    """Draw the Choosing of a round, None for a plain dispatch. May append separate choices first."""
    w = calls.world

    def draw() -> Any:
        mode = r.choice(MODES)
        return {
            "mode": mode,
            "activate": r.choice([None, w.experts_per_rank] if mode == "optimal" else [w.experts_per_rank]),
        }

    for _ in range(r.choice([0, 0, 1, 2])):
        routings = one_that_differs(w, r) if r.random() < 0.1 else None
        calls.program.choose(ids, Choosing(**draw(), routings=routings))
        refuse(calls)
    if r.random() < 0.2:
        return None
    return Choosing(
        **draw(), routings=one_that_differs(w, r, plain=w.schedule != "groups") if r.random() < 0.15 else None
    )


def one_that_differs(world: Any, r: random.Random, plain: bool = False) -> Any:
    """Routings in which one rank chooses for another layer or, with `plain`, perhaps does not choose at all."""
    routings = [1] * world.size
    routings[r.randrange(world.size)] = r.choice([0, 2]) if plain else 2
    return routings


class Deaths:
    """Ranks that die inside a decode step, after which the others mask them.

    .at: the round before which that happens. .masked: the dead ranks, once they are masked.
    """

    def __init__(self, calls: Any) -> None:
        self._calls, world = calls, calls.world
        self._r = r = random.Random(world.seed + 5)
        self.at = r.randrange(world.rounds)
        self.masked: tuple[int, ...] = ()
        self._victims = sorted(r.sample(range(world.size), r.choice([1, 1, 1, r.randint(1, world.size - 1)])))

    def interrupt(self, xs: Any, ids: Any, scales: Any) -> None:
        """Append the step in which they die, and the mask.

        Ranks reach different points of the step: some begin the next one, some have not begun this one.
        """
        p, r, size = self._calls.program, self._r, self._calls.world.size
        left = [rank for rank in range(size) if rank not in self._victims]
        ahead = r.sample(left, r.randint(0, len(left)))
        others = [rank for rank in range(size) if rank not in ahead]
        if r.random() < 0.5:  # they die after their part in the dispatch
            p.decode_dispatch(ids, xs=xs, scales=scales)
            p.decode_hook()
            p.leave_out(others)
            if r.random() < 0.7:
                p.decode_combine()
                p.leave_out(others)
        p.decode_dispatch(ids, xs=xs, scales=scales)
        p.leave_out(others)
        p.decode_mask(self._victims)
        self.masked = tuple(self._victims)


def without(masked: Any, cluster: Any, xs: Any, ids: Any, weights: Any, scales: Any) -> Any:
    """The arguments of a decode step as they count where ranks are masked: no tokens of theirs, no picks of their
    experts.
    """
    per_rank = cluster.num_experts // cluster.size
    gone = torch.zeros(cluster.size, dtype=torch.bool, device="cpu")
    gone[list(masked)] = True

    def cut(tensors: Any) -> Any:
        return tensors and [t[:0] if gone[rank] else t for rank, t in enumerate(tensors)]

    ids = [i.masked_fill((i >= 0) & gone[i.clamp(min=0) // per_rank], -1) for i in ids]
    return cut(xs), cut(ids), cut(weights), cut(scales)
