"""Random worlds for exploration: small clusters with a program of random calls."""

from __future__ import annotations

from typing import Any

import random
from dataclasses import dataclass, field, replace

import torch

from . import _programs as programs
from . import SCHEDULES, Cluster


@dataclass(frozen=True)
class World:
    """A small world and its calls. The rounds depend on `seed`, independently of the other fields."""

    seed: int
    nodes: int
    ranks_per_node: int
    channels: int
    experts_per_rank: int
    top_k: int
    tokens: int  # per rank, at most
    rounds: int
    decode: bool = False
    schedule: str = "roles"
    hidden: int = 16
    choice: bool = False  # dispatches choose replicas from the picks of all ranks
    mask: bool = False  # decode: ranks die, and the others go on without them

    @property
    def size(self) -> Any:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def kind(self) -> str:
        """What its programs exercise: "mask", "decode", "choice" or "dispatch"."""
        return "mask" if self.mask else "decode" if self.decode else "choice" if self.choice else "dispatch"

    def __str__(self) -> str:
        return (
            f"{self.kind} on {self.schedule} in {self.nodes} node(s) x {self.ranks_per_node} rank(s), "
            f"{self.channels} channel(s), {self.experts_per_rank} expert(s) per rank, top {self.top_k}, "
            f"up to {self.tokens} tokens, {self.rounds} round(s), program seed {self.seed}"
        )


@dataclass
class Calls:
    """The cluster (with payload) and the program of a World."""

    world: World
    cluster: Cluster
    program: Any
    pairs: list[Any] = field(default_factory=list)  # arguments of every dispatch, for the oracle
    refusals: random.Random = field(default_factory=random.Random)
    again: random.Random = field(default_factory=random.Random)


def random_world(seed: int, kind: Any = None) -> Any:
    """Draw the World of a program seed, of a given kind or of any."""
    r = random.Random(seed)
    nodes, per_node = r.choice([(1, 2), (1, 4), (2, 1), (2, 2), (2, 2), (3, 1), (2, 3), (3, 2), (4, 2)])
    experts = r.randint(1, 3)
    drawn = r.random()  # drawn for every kind, so that the later draws do not depend on the kind
    decode = kind in ("decode", "mask") if kind else drawn < 0.4
    world = World(
        seed,
        nodes,
        per_node,
        r.randint(1, 3),
        experts,
        min(r.randint(1, 4), experts * nodes * per_node),
        r.choice([r.randint(1, 7), r.randint(1, 7), r.randint(17, 40)]),
        r.randint(2, 3) if not decode else r.randint(3, 6),
        decode,
        r.choice(("roles", "lane") if decode else ("roles", "lane", "groups", "groups")),
    )
    if decode:
        return replace(world, mask=kind == "mask" if kind else random.Random(seed + 4).random() < 0.25)
    choice = kind == "choice" if kind else r.random() < 0.3
    return (
        replace(world, choice=choice, rounds=world.rounds + 1, schedule=r.choice(SCHEDULES))
        if choice
        else world
    )


def _rows(tokens: Any, hidden: int, scaled: bool, g: Any) -> Any:
    """(xs, scales): random rows of each rank. scales is None unless `scaled`, which makes FP8 rows."""
    if not scaled:
        return [
            torch.randn((t, hidden), generator=g, dtype=torch.float32, device="cpu").to(torch.bfloat16)
            for t in tokens
        ], None
    return (
        [
            torch.randint(1, 100, (t, hidden), generator=g, dtype=torch.uint8, device="cpu").view(
                torch.float8_e4m3fn
            )
            for t in tokens
        ],
        [torch.rand((t, -(-hidden // 128)), generator=g, dtype=torch.float32, device="cpu") for t in tokens],
    )


def build(world: Any) -> Any:
    """Build the Calls of a world. A pure function."""
    r, g = random.Random(world.seed + 1), torch.Generator().manual_seed(world.seed)
    num_experts, hidden = world.size * world.experts_per_rank, world.hidden
    rows = world.size * world.tokens * min(world.top_k, world.experts_per_rank)
    cluster = Cluster(
        world.size,
        ranks_per_node=world.ranks_per_node,
        hidden=hidden,
        num_experts=num_experts,
        top_k=world.top_k,
        max_tokens=world.tokens,
        channels=world.channels,
        num_sms=2,
        payload=True,
        decode=world.decode,
        schedule=world.schedule,
        placement=programs.placement(world, r) if world.choice else None,
        arena_bytes=-(-3 * (rows * (4 * hidden + 12 * world.top_k + 128) + 1024) // 4096) * 4096,
    )
    calls = Calls(
        world,
        cluster,
        cluster.program(),
        refusals=random.Random(world.seed + 2),
        again=random.Random(world.seed + 6),
    )
    holds = random.Random(world.seed + 3).random() < 0.25  # keep one dispatch's memory during the later ones
    held = False
    deaths = programs.Deaths(calls) if world.mask else None
    for number in range(world.rounds):
        layout = r.choice(["expert", "expert", "rank"])
        alignment = r.choice([1, 1, 3]) if layout == "expert" else 1
        tokens = [r.choice([0, world.tokens, r.randint(0, world.tokens)]) for _ in range(world.size)]
        ids = [
            torch.rand(
                (t, cluster.logical_experts or num_experts), generator=g, dtype=torch.float32, device="cpu"
            ).argsort(1)[:, : world.top_k]
            for t in tokens
        ]
        ids = [
            i.masked_fill(torch.rand(i.shape, generator=g, dtype=torch.float32, device="cpu") < 0.2, -1)
            for i in ids
        ]
        weights = [
            torch.rand((t, world.top_k), generator=g, dtype=torch.float32, device="cpu") for t in tokens
        ]
        capacity = r.choice([None, None, rows + world.experts_per_rank * (alignment - 1) + 3, 1])
        xs, scales = _rows(tokens, hidden, r.random() < 0.3, g)
        if world.decode:
            if deaths and deaths.at == number:
                deaths.interrupt(xs, ids, scales)
            _decode_round(calls, r, xs, ids, weights, scales, number, deaths.masked if deaths else ())
            continue
        choosing = programs.choose(calls, r, ids) if world.choice else None
        refused = capacity == 1 or (choosing is not None and choosing.routings is not None)
        handle = number % 2
        quant = None if scales is not None else r.choice([None, None, "fp8", "fp8_ue8m0"])
        wire = r.choice([None, None, "fp8", "logfmt10"])
        shape = {"layout": layout, "expert_alignment": alignment, "capacity": capacity, "choosing": choosing}
        calls.program.dispatch(
            ids,
            weights,
            xs=xs,
            scales=scales,
            quant=quant,
            handle=handle,
            before_ns=r.choice([0, 0, 20_000]),
            **shape,
        )
        refused = programs.refuse(calls) or refused
        if quant is None and not refused:
            calls.pairs.append((xs, ids, weights, scales, shape))
        if holds and not (held or refused or choosing):
            calls.program.dispatch(ids, weights, xs=xs, scales=scales, quant=quant, handle=2, **shape)
            held = True
        again = r.random() < 0.3
        echo_weights = layout == "expert" and r.random() < 0.7
        calls.program.combine(handle=handle, echo_weights=echo_weights, wire=wire, keep=again)
        if not refused:
            programs.refuse(calls)
        if again:  # combine the same rows again
            calls.program.combine(handle=handle, echo_weights=echo_weights, wire=wire, flip=1)
        if r.random() < 0.3 and not refused:  # reuse the plan with other rows
            fresh = [
                torch.randn((t, hidden), generator=g, dtype=torch.float32, device="cpu").to(torch.bfloat16)
                for t in tokens
            ]
            calls.program.dispatch(xs=fresh, handle=handle, **{**shape, "choosing": None})
            calls.program.combine(handle=handle, flip=2)
    if held:
        calls.program.combine(handle=2, flip=3)
    if (
        world.ranks_per_node == 1
        and not world.decode
        and not world.choice
        and world.schedule != "groups"
        and calls.refusals.random() < 0.3
    ):
        programs.stray(calls, xs, ids)
    return calls


def _decode_round(
    calls: Any, r: random.Random, xs: Any, ids: Any, weights: Any, scales: Any, number: int, masked: Any
) -> None:
    """Append a decode dispatch; with some probability its receive phase, and a combine. masked: dead ranks."""
    p, travel = calls.program, r.random() < 0.4
    quant = None if scales is not None else r.choice([None, None, "fp8"])
    p.decode_dispatch(
        ids,
        weights if travel else None,
        xs=xs,
        scales=scales,
        quant=quant,
        before_ns=r.choice([0, 0, 20_000]),
    )
    if quant is None:
        calls.pairs.append((xs, ids, weights, scales, {"travel": travel, "masked": masked}))
    programs.refuse(calls)
    if r.random() < 0.2:
        return  # the next dispatch receives the rows of this one, which are never combined
    p.decode_hook()
    if r.random() < 0.8:
        p.decode_combine(
            None if travel else weights, flip=number % 3, wire=r.choice([None, None, "fp8", "logfmt10"])
        )
        refused = programs.refuse(calls)
        if r.random() < 0.8:
            p.decode_hook()
            if not refused and not masked:
                programs.combine_again(calls, None if travel else weights)
