"""`python -m moecomm explore`: random schedules of small worlds, hunting deadlocks and reordering bugs.

A program (a few calls with random routing on a small world) runs once calmly; its results are compared with
the oracle. Then it runs under chaos: delays and pauses are drawn, puts land late and out of order, stores
become visible as late as the Fabric contract allows. Whatever hangs, fails or delivers other bits is cut
down and printed: the seeds, the fewest perturbations, who waits for whom, and the trace.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import random
import time
from dataclasses import dataclass, field, replace

import torch

from .. import options

from ..testing import reference
from ..balance import Placement
from .mutations import MUTATIONS
from . import MODES, SCHEDULES, Choosing, Cluster, describe_waiting


@dataclass(frozen=True)
class World:
    """A small world and the calls that it makes. `rounds` are drawn from `seed`, whatever the other fields are."""

    seed: int
    nodes: int
    ranks_per_node: int
    channels: int
    experts_per_rank: int
    top_k: int
    tokens: int  # most of a rank
    rounds: int
    decode: bool = False
    schedule: str = "roles"
    hidden: int = 16
    choice: bool = False  # of replicas, by everyone's picks

    @property
    def size(self):
        """Ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def kind(self):
        """What its programs are about."""
        return "decode" if self.decode else "choice" if self.choice else "dispatch"

    def __str__(self):
        return (
            f"{self.kind} on {self.schedule} in {self.nodes} node(s) x {self.ranks_per_node} rank(s), {self.channels} channel(s), {self.experts_per_rank} expert(s) per rank, "
            f"top {self.top_k}, up to {self.tokens} tokens, {self.rounds} round(s), program seed {self.seed}"
        )


@dataclass
class Calls:
    """A cluster with payload and the native program of a World."""

    world: World
    cluster: Cluster
    program: object
    pairs: list = field(default_factory=list)  # what the oracle needs, per dispatch
    refusals: random.Random = None


def random_world(seed, kind=None):
    """The world of a program seed; of a kind, if told."""
    r = random.Random(seed)
    nodes, per_node = r.choice([(1, 2), (1, 4), (2, 1), (2, 2), (2, 2), (3, 1), (2, 3), (3, 2), (4, 2)])
    experts = r.randint(1, 3)
    drawn = r.random()  # whatever is told, so that the rest stays
    decode = kind == "decode" if kind else drawn < 0.4
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
        r.choice(("roles", "lane") if decode else ("roles", "lane", "seats", "seats")),
    )
    choice = kind == "choice" if kind else not decode and r.random() < 0.3
    return (
        replace(world, choice=choice, rounds=world.rounds + 1, schedule=r.choice(SCHEDULES))
        if choice
        else world
    )


def _rows(tokens, hidden, scaled, g):
    """(xs, scales): random rows of every rank, quantized or not."""
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


def build(world):
    """The Calls of a world: a pure function of it."""
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
        placement=_placement(world, r) if world.choice else None,
        arena_bytes=-(-3 * (rows * (4 * hidden + 12 * world.top_k + 128) + 1024) // 4096) * 4096,
    )
    calls = Calls(world, cluster, cluster.program(), refusals=random.Random(world.seed + 2))
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
            _decode_round(calls, r, xs, ids, weights, scales, number)
            continue
        choosing = _choose(calls, r, ids) if world.choice else None
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
        refused = _refuse(calls) or refused
        if quant is None and not refused:
            calls.pairs.append((xs, ids, weights, scales, shape))
        again = r.random() < 0.3
        echo_weights = layout == "expert" and r.random() < 0.7
        calls.program.combine(handle=handle, echo_weights=echo_weights, wire=wire, keep=again)
        if not refused:
            _refuse(calls)
        if again:  # the rows are still there: once more, from the same place
            calls.program.combine(handle=handle, echo_weights=echo_weights, wire=wire, flip=1)
        if r.random() < 0.3 and not refused:  # the plan is reused with other rows
            fresh = [
                torch.randn((t, hidden), generator=g, dtype=torch.float32, device="cpu").to(torch.bfloat16)
                for t in tokens
            ]
            calls.program.dispatch(xs=fresh, handle=handle, **{**shape, "choosing": None})
            calls.program.combine(handle=handle, flip=2)
    if (
        world.ranks_per_node == 1
        and not world.decode
        and not world.choice
        and world.schedule != "seats"
        and calls.refusals.random() < 0.3
    ):
        _stray(calls, xs, ids)
    return calls


def _refuse(calls):
    """Perhaps some ranks refuse their parts in the call that was appended last: whether they do."""
    r, size = calls.refusals, calls.world.size
    refused = r.random() < 0.12
    if refused:
        calls.program.refuse(r.sample(range(size), r.choice([1, 1, 1, r.randint(1, size), size])))
    return refused


def _stray(calls, xs, ids):
    """The program's end: one rank makes another call than its peers, which no rank of another node can go on from."""
    calls.program.dispatch(ids, xs=[x.new_zeros(x.shape, dtype=torch.bfloat16) for x in xs])
    if calls.refusals.random() < 0.5:
        calls.program.combine()
    calls.program.refuse([calls.refusals.randrange(calls.world.size)], strays=True)


def _placement(world, r):
    """Experts dealt out in turn, so that no rank has one twice: from as few as a rank or a token needs to one for most slots."""
    slots, fewest = world.size * world.experts_per_rank, max(world.top_k, world.experts_per_rank)
    experts = r.randint(fewest, max(fewest, slots * 3 // 4))
    deck = r.sample(range(experts), experts)
    table = [deck[slot % experts] for slot in range(slots)]
    return Placement(torch.tensor([table], dtype=torch.int64, device="cpu"), experts, world.size, world.nodes)


def _choose(calls, r, ids):
    """The Choosing of a round, None for a plain dispatch; before it, perhaps some choices by themselves."""
    w = calls.world

    def draw():
        mode = r.choice(MODES)
        return {
            "mode": mode,
            "activate": r.choice([None, w.experts_per_rank] if mode == "optimal" else [w.experts_per_rank]),
        }

    for _ in range(r.choice([0, 0, 1, 2])):
        calls.program.choose(ids, Choosing(**draw(), routings=_odd_one(w, r) if r.random() < 0.1 else None))
        _refuse(calls)
    if r.random() < 0.2:
        return None
    return Choosing(
        **draw(), routings=_odd_one(w, r, plain=w.schedule != "seats") if r.random() < 0.15 else None
    )


def _odd_one(world, r, plain=False):
    """One rank that chooses by another layer, or does not choose at all."""
    routings = [1] * world.size
    routings[r.randrange(world.size)] = r.choice([0, 2]) if plain else 2
    return routings


def _decode_round(calls, r, xs, ids, weights, scales, number):
    """A decode dispatch, perhaps without its receive phase, and perhaps a combine."""
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
        calls.pairs.append((xs, ids, weights, scales, {"travel": travel}))
    _refuse(calls)
    if r.random() < 0.2:
        return  # the next dispatch receives this one, its rows are not answered
    p.decode_hook()
    if r.random() < 0.8:
        p.decode_combine(
            None if travel else weights, flip=number % 3, wire=r.choice([None, None, "fp8", "logfmt10"])
        )
        _refuse(calls)
        if r.random() < 0.8:
            p.decode_hook()


def _same(a, b):
    return (a is None) == (b is None) and (a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8)))


def check_calm_decode(calls):
    """As check_calm, for decode."""
    c = calls.cluster
    for xs, ids, weights, scales, how in calls.pairs:
        c.reset()
        want = reference.decode_dispatch(
            xs, ids, num_experts=c.num_experts, max_tokens=c.max_tokens, scales=scales
        )
        got = c.decode_dispatch(xs, ids, weights if how["travel"] else None, scales=scales)
        for rank, (g, w) in enumerate(zip(got, want)):
            same = _same(g.counts, w.counts)
            for e, n in enumerate(w.counts.tolist()):
                same = same and _same(g.x[e, :n].contiguous(), w.x[e, :n].contiguous())
                same = same and (
                    scales is None or _same(g.scales[e, :n].contiguous(), w.scales[e, :n].contiguous())
                )
            assert same, f"{calls.world}: calm decode dispatch differs from the oracle on rank {rank}"
        if scales is None:
            rows = [w.x for w in want]
            ys = c.decode_combine(rows, None if how["travel"] else weights, num_tokens=[len(x) for x in xs])
            expected = reference.decode_combine(
                rows, ids, weights, num_experts=c.num_experts, weights_travel=how["travel"]
            )
            assert all(_same(y, e) for y, e in zip(ys, expected)), (
                f"{calls.world}: calm decode combine differs from the oracle"
            )


def check_calm(calls):
    """The calm schedule of every dispatch equals the oracle; raises AssertionError where not."""
    c = calls.cluster
    for xs, ids, weights, scales, shape in calls.pairs:
        c.reset()
        got = c.dispatch(xs, ids, weights, scales=scales, **shape)
        shape, choosing = dict(shape), shape["choosing"]
        del shape["choosing"]
        slots = ids if choosing is None else choosing.slots
        if choosing is not None:
            check_choice(calls, ids, choosing)
        want = reference.dispatch(xs, slots, weights, num_experts=c.num_experts, scales=scales, **shape)
        for rank, (g, w) in enumerate(zip(got, want)):
            for name in (
                "x",
                "scales",
                "topk_weights",
                "topk_ids",
                "tokens_per_expert",
                "source_rank",
                "source_token",
            ):
                assert _same(getattr(g, name), getattr(w, name)), (
                    f"{calls.world}: calm dispatch differs from the oracle on rank {rank}: {name}"
                )
        if scales is None:
            ys = c.combine([w.x for w in want], num_tokens=[len(x) for x in xs])
            expected = reference.combine(
                [w.x for w in want], want, [len(x) for x in xs], ranks_per_node=c.ranks_per_node
            )
            for rank in range(c.size):
                assert _same(ys[rank], expected[rank]), (
                    f"{calls.world}: calm combine differs from the oracle on rank {rank}"
                )


def check_choice(calls, ids, choosing):
    """Every pick has a slot that holds its expert, and all ranks have counted all picks; raises AssertionError where not."""
    c = calls.cluster
    picks = torch.cat([i.flatten() for i in ids])
    counted = torch.bincount(picks[picks >= 0], minlength=c.logical_experts)
    for rank, (wanted, slots) in enumerate(zip(ids, choosing.slots)):
        served = torch.where(slots < 0, -1, c.placement.physical_to_logical[0][slots.clamp(min=0)])
        assert torch.equal(served, wanted), f"{calls.world}: rank {rank} chose slots of other experts"
        assert torch.equal(choosing.counted[rank].long(), counted), (
            f"{calls.world}: rank {rank} counted other picks"
        )


def explore_world(world, schedules, *, first_seed=0, flaw="none", phase="none", chosen=False, oracle=True):
    """Run `schedules` schedules of a world; returns the native finding as a dict, `world` added."""
    calls = build(world)
    if oracle:
        (check_calm_decode if world.decode else check_calm)(calls)

    def explore():
        return calls.cluster._native.explore(
            calls.program._native, flaw, phase, chosen, first_seed, schedules
        )

    # A flawed protocol may also read what it should not: that ends a process, and is as good as found.
    found = explore() if flaw == "none" else _in_child(explore)
    if found is None:
        found = {
            "found": True,
            "schedules": schedules,
            "seed": first_seed,
            "perturbations": 0,
            "call": -1,
            "rank": -1,
            "what": "crash",
            "log": [],
            "stuck": [],
        }
    found["world"] = world
    return found


def _in_child(fn):
    """fn's result from a forked process, None where that died."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        faulthandler.disable()  # a crash is an answer here
        with os.fdopen(write, "wb") as out:
            pickle.dump(fn(), out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as data:
        result = data.read()
    return pickle.loads(result) if os.waitpid(pid, 0)[1] == 0 else None


def shrink(found, *, flaw="none", phase="none", schedules=300):
    """Smaller worlds that fail too: the finding with the shortest trace."""
    best = found
    progress = True
    while progress:
        progress = False
        w = best["world"]
        smaller = [replace(w, rounds=w.rounds - 1)] if w.rounds > 1 else []
        smaller += [replace(w, channels=1)] if w.channels > 1 else []
        smaller += [replace(w, tokens=t) for t in {1, w.tokens // 2, w.tokens - 1} if 0 < t < w.tokens]
        smaller += (
            [replace(w, ranks_per_node=w.ranks_per_node - 1)]
            if w.ranks_per_node > 1 and w.top_k <= (w.size - w.nodes) * w.experts_per_rank
            else []
        )
        smaller += (
            [replace(w, nodes=w.nodes - 1)]
            if w.nodes > 1 and w.top_k <= (w.size - w.ranks_per_node) * w.experts_per_rank
            else []
        )
        for candidate in smaller:
            again = explore_world(candidate, schedules, flaw=flaw, phase=phase, oracle=False)
            if again["found"] and 0 < len(again["log"]) < len(
                best["log"]
            ):  # 0: it crashed, which shows nothing
                best, progress = again, True
                break
    return best


def report(found):
    """A finding in words."""
    lines = [
        f"{found['what']}: call {found['call']}, rank {found['rank']}; schedule seed {found['seed']}, {found['perturbations']} perturbation(s)",
        f"  world: {found['world']}",
    ]
    lines += [f"  {describe_waiting(w)}" for w in found["stuck"]]
    trace = [line for line in found["log"] if line["did"] != "landed"]
    lines.append(f"  the last of {len(trace)} steps (us):")
    for line in trace[-40:]:
        who = f"rank {line['rank']} {line['role']}" + (f"[{line['channel']}]" if line["channel"] >= 0 else "")
        what = {"role": "ends", "give_up": "gives up waiting"}.get(line["did"], line["did"])
        of = (
            ""
            if line["did"] == "role"
            else f" peer {line['peer']} at {line['offset']} value {line['value']}"
            + (f" ({line['phase']})" if line["phase"] != "none" else "")
        )
        lines.append(f"    {line['begin'] / 1e6:10.3f} .. {line['end'] / 1e6:10.3f}  {who:22} {what}{of}")
    return "\n".join(lines)


def _work(job):
    """A worker's share of the worlds: the first finding, or None."""
    seeds, kind, per_world, total, current = job
    torch.set_num_threads(1)
    for seed in seeds:
        current.value = seed
        found = explore_world(random_world(seed, kind), per_world)
        with total.get_lock():
            total.value += found["schedules"]
        if found["found"]:
            return found
    return None


def _process(job, findings):
    findings.put(_work(job))


def run(schedules, *, first_seed=0, kind=None, per_world=250, workers=None):
    """Explore `schedules` schedules (of a kind of programs) with `workers` processes; returns (schedules run, first finding or None).

    Raises
    ------
    RuntimeError
        A worker died; names the program seed that it was at.
    """
    workers = workers or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    total, findings = context.Value("q", 0), context.SimpleQueue()
    seeds = range(first_seed, first_seed - (-schedules // per_world))
    jobs = [(list(seeds[i::workers]), kind, per_world, total, context.Value("q", -1)) for i in range(workers)]
    processes = [context.Process(target=_process, args=(job, findings)) for job in jobs]
    for process in processes:
        process.start()
    for process, job in zip(processes, jobs):
        process.join()
        if process.exitcode:
            raise RuntimeError(
                f"explore: a worker died with status {process.exitcode} at program seed {job[4].value}"
            )
    results = [findings.get() for _ in processes]
    return total.value, next((f for f in results if f), None)


def arguments(parser):
    """Arguments of the command."""
    parser.add_argument("--schedules", type=options.positive, default=100_000)
    parser.add_argument("--seed", type=options.count, default=0, help="of the first program")
    parser.add_argument("--kind", choices=("dispatch", "decode", "choice"), help="of programs; default: all")
    parser.add_argument("--per-world", type=options.positive, default=250, help="schedules of each program")
    parser.add_argument("--workers", type=options.ranks, default=None, help="processes; default: all cores")
    parser.add_argument(
        "--mutations",
        action="store_true",
        help="first break the protocol in every known way: each must be found",
    )


def find_mutation(flaw, phase, kind, *, schedules_per_world=100, worlds=200, first_seed=0):
    """(schedules until it was found, finding), or (schedules, None)."""
    run_so_far = 0
    chosen = kind == "chosen"
    for world in (
        w
        for seed in range(first_seed, first_seed + worlds)
        if (w := random_world(seed)).kind == ("choice" if chosen else kind)
    ):
        found = explore_world(world, schedules_per_world, flaw=flaw, phase=phase, chosen=chosen, oracle=False)
        run_so_far += found["schedules"]
        if found["found"]:
            return run_so_far, found
    return run_so_far, None


def main(args):
    """Explore; status 1 where something was found, or a mutation was not."""
    missed = 0
    if args.mutations:
        for name, flaw, phase, kind in MUTATIONS:
            n, found = find_mutation(flaw, phase, kind)
            missed += found is None
            print(
                f"  {name:48} "
                + (f"found in schedule {n}: {found['what']}" if found else f"NOT FOUND in {n} schedules"),
                flush=True,
            )
    begin = time.perf_counter()
    n, found = run(
        args.schedules, first_seed=args.seed, kind=args.kind, per_world=args.per_world, workers=args.workers
    )
    print(
        f"{n} schedules in {time.perf_counter() - begin:.0f} s: "
        + ("nothing found" if found is None else "FOUND")
    )
    if found is not None:
        print(report(found))
        small = shrink(found)
        if small is not found:
            print("the shortest trace found:\n" + report(small))
    return 1 if found is not None or missed else 0
