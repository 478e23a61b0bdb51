"""`python -m moecomm explore`: runs random schedules of small worlds to find deadlocks and ordering bugs.

A program is a few calls with random routing on a small world. It runs once on the undisturbed schedule, and its
results are compared with the oracle. Then it runs on random schedules: delays and pauses are random, puts land late
and out of order, and stores become visible as late as the Fabric contract allows. A run that hangs, fails or returns
other bits is a finding. It is reduced and printed: seeds, smallest number of perturbations, waiting ranks and trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
import argparse

import faulthandler
import multiprocessing
import os
import pickle
import time
from dataclasses import replace

import torch

from .. import options
from ..testing import reference
from . import _programs as programs
from ._worlds import build, random_world
from .mutations import MUTATIONS
from . import describe_waiting


def _same(a: Any, b: Any) -> Any:
    return (a is None) == (b is None) and (a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8)))


def check_calm_decode(calls: Any) -> None:
    """Like check_calm, for decode."""
    c = calls.cluster
    for xs, ids, weights, scales, how in calls.pairs:
        c.reset()
        masked = how["masked"]
        left = [rank for rank in range(c.size) if rank not in masked]
        got: Any = c.decode_dispatch(
            xs, ids, weights if how["travel"] else None, scales=scales, masked=masked
        )
        if masked:
            xs, ids, weights, scales = programs.without(masked, c, xs, ids, weights, scales)
        want: Any = reference.decode_dispatch(
            xs, ids, num_experts=c.num_experts, max_tokens=c.max_tokens, scales=scales
        )
        for rank in left:
            g, w = got[rank], want[rank]
            same = _same(g.counts, w.counts)
            for e, n in enumerate(w.counts.tolist()):
                same = same and _same(g.x[e, :n].contiguous(), w.x[e, :n].contiguous())
                same = same and (
                    scales is None or _same(g.scales[e, :n].contiguous(), w.scales[e, :n].contiguous())
                )
            assert same, f"{calls.world}: calm decode dispatch differs from the oracle on rank {rank}"
        if scales is None:
            for rows in ([w.x for w in want], [-w.x for w in want]):  # the same dispatch is combined twice
                ys = c.decode_combine(
                    rows, None if how["travel"] else weights, num_tokens=[len(x) for x in xs], masked=masked
                )
                expected = reference.decode_combine(
                    rows, ids, weights, num_experts=c.num_experts, weights_travel=how["travel"]
                )
                assert all(_same(ys[rank], expected[rank]) for rank in left), (
                    f"{calls.world}: calm decode combine differs from the oracle"
                )


def check_calm(calls: Any) -> None:
    """Raise AssertionError unless every dispatch equals the oracle on the undisturbed schedule."""
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


def check_choice(calls: Any, ids: Any, choosing: Any) -> None:
    """Raise AssertionError unless every pick got a slot of its expert and all ranks have counted all picks."""
    c = calls.cluster
    picks = torch.cat([i.flatten() for i in ids])
    counted = torch.bincount(picks[picks >= 0], minlength=c.logical_experts)
    for rank, (wanted, slots) in enumerate(zip(ids, choosing.slots)):
        served = torch.where(slots < 0, -1, c.placement.physical_to_logical[0][slots.clamp(min=0)])
        assert torch.equal(served, wanted), f"{calls.world}: rank {rank} chose slots of other experts"
        assert torch.equal(choosing.counted[rank].long(), counted), (
            f"{calls.world}: rank {rank} counted other picks"
        )


def explore_world(
    world: Any,
    schedules: int,
    *,
    first_seed: int = 0,
    mutant: str = "none",
    phase: str = "none",
    chosen: bool = False,
    oracle: bool = True,
) -> Any:
    """Run `schedules` schedules of a world. Returns a dict: the result of the native code, and `world`."""
    calls = build(world)
    if oracle:
        (check_calm_decode if world.decode else check_calm)(calls)

    def explore() -> Any:
        return calls.cluster.native.explore(
            calls.program.native, mutant, phase, chosen, first_seed, schedules
        )

    # A mutant may read invalid memory and crash. A crash counts as a finding.
    found = explore() if mutant == "none" else _in_child(explore)
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


def _in_child(fn: Callable[[], Any]) -> Any:
    """Call fn in a forked process; return its result, None if the process died. Raises what fn raises."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        faulthandler.disable()  # a crash is an expected result
        try:
            result: Any = fn(), None
        except Exception as error:
            result = None, error
        with os.fdopen(write, "wb") as out:
            pickle.dump(result, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as data:
        data_read = data.read()
    if os.waitpid(pid, 0)[1] != 0:
        return None
    found, raised = pickle.loads(data_read)
    if raised is not None:
        raise raised
    return found


def shrink(found: Any, *, mutant: str = "none", phase: str = "none", schedules: int = 300) -> Any:
    """Search smaller worlds that fail too; return the finding with the shortest trace."""
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
            again = explore_world(candidate, schedules, mutant=mutant, phase=phase, oracle=False)
            # A crash has an empty trace: it is no better finding.
            if again["found"] and 0 < len(again["log"]) < len(best["log"]):
                best, progress = again, True
                break
    return best


def report(found: Any) -> str:
    """Describe a finding as text."""
    lines = [
        f"{found['what']}: call {found['call']}, rank {found['rank']}; schedule seed {found['seed']}, "
        f"{found['perturbations']} perturbation(s)",
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


def _work(job: Any) -> Any:
    """Explore one worker's share of the worlds; return its first finding, or None."""
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


def _process(job: Any, findings: Any) -> None:
    findings.put(_work(job))


def run(
    schedules: int, *, first_seed: int = 0, kind: Any = None, per_world: int = 250, workers: int | None = None
) -> Any:
    """Explore `schedules` schedules with `workers` processes. Returns (schedules run, first finding or None).

    Raises
    ------
    RuntimeError
        A worker died. The text names its exit status and the seed of its program.
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
                f"explore: a worker process died with exit status {process.exitcode} at program seed {job[4].value}; "
                f"run it again with --seed {job[4].value} --workers 1"
            )
    results = [findings.get() for _ in processes]
    return total.value, next((f for f in results if f), None)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--schedules", type=options.positive, default=100_000, help="number of schedules")
    parser.add_argument("--seed", type=options.count, default=0, help="seed of the first program")
    parser.add_argument(
        "--kind", choices=("dispatch", "decode", "mask", "choice"), help="programs; default: all"
    )
    parser.add_argument("--per-world", type=options.positive, default=250, help="schedules per program")
    parser.add_argument("--workers", type=options.ranks, default=None, help="processes; default: all cores")
    parser.add_argument(
        "--mutations",
        action="store_true",
        help="first run every mutant of the protocol; exploration must find each",
    )


def find_mutation(
    mutant: str,
    phase: str,
    kind: Any,
    *,
    schedules_per_world: int = 100,
    worlds: Any = 200,
    first_seed: int = 0,
) -> Any:
    """Explore a mutant until it is found. Returns (schedules run, finding or None)."""
    run_so_far = 0
    chosen = kind == "chosen"
    for world in (
        w
        for seed in range(first_seed, first_seed + worlds)
        if (w := random_world(seed)).kind == ("choice" if chosen else kind)
    ):
        found = explore_world(
            world, schedules_per_world, mutant=mutant, phase=phase, chosen=chosen, oracle=False
        )
        run_so_far += found["schedules"]
        if found["found"]:
            return run_so_far, found
    return run_so_far, None


def main(args: argparse.Namespace) -> int:
    """Explore. The exit status is 1 if there is a finding, or if a mutant was not found."""
    missed = 0
    if args.mutations:
        for name, mutant, phase, kind in MUTATIONS:
            n, found = find_mutation(mutant, phase, kind)
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
            print("the finding with the shortest trace:\n" + report(small))
    return 1 if found is not None or missed else 0
