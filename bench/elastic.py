"""elastic: time from the kill of processes to the first correct step of the survivors; time to join.

Each kill has a new world. Each survivor compares every step bit for bit with the expected sum: experts multiply rows
by powers of two, so sums of their rows do not depend on the order of ranks. A step is a dispatch and a combine.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch

import moecomm
from moecomm import options

from . import cases
from .elastic_joins import join
from .elastic_world import DEADLINE, TIMEOUT, Server, plot, usage

VICTIMS = ("rank", "gateway", "rank 0", "node", "two ranks")
PARTS = ("detect_s", "agree_s", "reconnect_s", "first_step_s")


def arguments(parser):
    """Add the options of the command."""
    parser.add_argument("--kills", type=options.positive, default=2, help="worlds per kind of victim")
    parser.add_argument(
        "--victims",
        type=options.some_of(*VICTIMS),
        default=",".join(VICTIMS),
        help="comma-separated list of " + ", ".join(VICTIMS),
    )
    parser.add_argument("--joins", type=options.count, default=1, help="worlds in which a new rank joins")
    parser.add_argument("--ranks", type=options.ranks, default=8, help="number of ranks")
    parser.add_argument("--ranks-per-node", type=options.ranks, default=4, help="ranks per node")
    parser.add_argument("--hidden", type=options.tokens, default=7168, help="elements of a token")
    parser.add_argument("--tokens", type=options.tokens, default=32, help="tokens per rank")
    parser.add_argument("--experts", type=options.ranks, default=64, help="experts over all ranks")
    parser.add_argument("--top-k", type=options.ranks, default=8, help="picks per token")
    parser.add_argument(
        "--routing",
        type=options.source("uniform", "zipf", "text"),
        default="text",
        help="uniform, zipf, text, or a file or folder as for `bench dispatch`",
    )
    parser.add_argument("--seed", type=options.count, default=0, help="seed of victims and moments")
    parser.add_argument(
        "--json", type=options.file_to_write, help="write one object per kill and a summary to this file"
    )
    parser.add_argument(
        "--plot",
        type=options.file_to_write,
        help="write a PNG with tokens per second around one kill or join",
    )
    parser.add_argument(
        "--steps",
        type=options.count,
        default=200,
        help="pairs of steps for the cost without failures; 0: none",
    )


def _serve(folder, rank, case, seed, progress, last):
    """Run steps until the last one that the parent names. Write FOLDER/RANK.json."""
    folder = Path(folder)
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
    how = dict(ranks_per_node=case.ranks_per_node, timeout=TIMEOUT)
    moecomm.Communicator(dist.group.WORLD, **how).close()  # libraries keep some things that they open once
    before = usage()
    comm = moecomm.Communicator(dist.group.WORLD, **how)
    server = Server(comm, case, seed, rank)
    stamps, wrong = [], 0
    while not last.value or len(stamps) < last.value:
        if progress[case.ranks] == rank + 1 and len(stamps) == 5:  # let this gateway die while it forwards
            server.buf.backend.memory.native.set_fault(
                point="copy", action="kill", passes=random.Random(seed).randint(0, 60)
            )
        y, lost = comm.retry(server.step)
        stamps.append((time.monotonic(), comm.generation))
        wrong += server.wrong(y, lost)
        progress[rank] = len(stamps)
    recoveries = [[r.detected, r.agreed, r.ready, list(r.verdict.lost)] for r in comm.recoveries]
    report = {
        "stamps": stamps,
        "recoveries": recoveries,
        "members": comm.members,
        "wrong": wrong,
        "files": _mapped_files(),
    }
    server.buf.close()
    comm.close()
    del server, y, lost
    gc.collect()
    report["leaked"] = [max(0, now - then) for now, then in zip(usage(), before, strict=True)]
    (folder / f"{rank}.json").write_text(json.dumps(report))


def _victims(kind, case, rng):
    """[(seconds after the previous kill, ranks to kill)]"""
    per_node, ranks = case.ranks_per_node, case.ranks
    other = rng.randrange(1, ranks)
    if kind == "rank 0":
        return [(0.0, [0])]
    if kind == "node":
        node = rng.randrange(ranks // per_node)
        return [(0.0, list(range(node * per_node, (node + 1) * per_node)))]
    if kind == "two ranks":
        return [(0.0, [other]), (rng.uniform(0.0, 0.2), [(other + rng.randrange(1, ranks)) % ranks])]
    return [(0.0, [other])]


def _mapped_files():
    """Names in /dev/shm that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split("/dev/shm/")[1].split()[0] for line in lines if "/dev/shm/" in line})


def kill(case, kind, seed, context):
    """Run one world with a kill.

    Returns (object for the report, more for the summary, reports of the survivors, times of the kills).
    """
    rng = random.Random(seed)
    plan = _victims(kind, case, rng)
    progress, last = context.Array("l", case.ranks + 1, lock=False), context.Value("l", 0, lock=False)
    if kind == "gateway":
        progress[case.ranks] = plan[0][1][0] + 1
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_serve, args=(folder, r, case, seed, progress, last))
            for r in range(case.ranks)
        ]
        for p in ranks:
            p.start()
        try:
            killed = _kill(kind, plan, ranks, progress, rng)
            victims = {r for _, some in plan for r in some}
            survivors = [r for r in range(case.ranks) if r not in victims]
            end = time.monotonic() + DEADLINE
            at = max(progress[r] for r in survivors)
            while min(progress[r] for r in survivors) < at + 3 and time.monotonic() < end:
                if any(ranks[r].exitcode for r in survivors):
                    break
                time.sleep(0.01)
            last.value = max(progress[r] for r in survivors) + 3
            for r in survivors:
                ranks[r].join(max(0.0, end - time.monotonic()))
            hung = [r for r in survivors if ranks[r].exitcode is None]
            failed = [r for r in survivors if ranks[r].exitcode]
            paths = [Path(folder) / f"{r}.json" for r in survivors]
            reports = [json.loads(p.read_text()) for p in paths if p.exists()]
        finally:
            for p in ranks:
                p.kill()
                p.join()
    found = {
        "victim": kind,
        "moment": "while it forwards" if kind == "gateway" else "any",
        **_parts(reports, killed),
        "wrong": sum(t["wrong"] for t in reports),
        "hung": len(hung),
        "verdicts": len({json.dumps([[r[3] for r in t["recoveries"]], t["members"]]) for t in reports}),
    }
    more = {
        "total_s": None if found["detect_s"] is None else round(sum(found[p] for p in PARTS), 4),
        "failed": len(failed),
        "leaked_files": len({name for t in reports for name in t["files"]} & set(os.listdir("/dev/shm"))),
        "leaked_descriptors": sum(t["leaked"][0] for t in reports),
        "leaked_bytes": sum(t["leaked"][1] for t in reports),
    }
    return found, more, reports, killed


def _kill(kind, plan, ranks, progress, rng):
    """Kill the ranks of the plan; return the times."""
    while min(progress[: len(ranks)]) < 4:
        if any(p.exitcode is not None for p in ranks):
            break
        time.sleep(0.002)
    killed = []
    if kind == "gateway":
        ranks[plan[0][1][0]].join(DEADLINE)
        return [time.monotonic()]
    time.sleep(rng.uniform(0.0, 0.1))
    for pause, victims in plan:
        time.sleep(pause)
        for r in victims:
            os.kill(ranks[r].pid, signal.SIGKILL)
        killed.append(time.monotonic())
    return killed


def _parts(reports, killed):
    """Seconds of each part of the recovery, from the last kill, of the slowest survivor."""
    if not reports or not all(t["recoveries"] for t in reports):
        return dict.fromkeys(PARTS)
    at = killed[-1]
    ends = [max(at, *(t["recoveries"][-1][i] for t in reports)) for i in range(3)]
    final = [t["stamps"][-1][1] for t in reports]
    first = max(
        min(when for when, generation in t["stamps"] if generation == last)
        for t, last in zip(reports, final, strict=True)
    )
    parts = [a - b for a, b in zip([*ends, first], [at, *ends], strict=True)]
    return {n: round(p, 4) for n, p in zip(PARTS, parts, strict=True)}


def static_cost(case, pairs, context):
    """Relative cost of retry without failures: median of the ratios of adjacent steps with and without it, minus 1."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_pairs, args=(folder, r, case, pairs)) for r in range(case.ranks)]
        for p in ranks:
            p.start()
        for p in ranks:
            p.join()
        plain, lasting = json.loads((Path(folder) / "0.json").read_text())
    return statistics.median(b / a for a, b in zip(plain, lasting, strict=True)) - 1


def _pairs(folder, rank, case, pairs):
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
    with moecomm.Communicator(dist.group.WORLD, ranks_per_node=case.ranks_per_node) as comm:
        server, times = Server(comm, case, 0, rank), ([], [])
        for i in range(2 * pairs + 10):
            begin = time.perf_counter()
            if i % 2:
                comm.retry(server.step)
            else:
                server.step()
            if i >= 10:
                times[i % 2].append(time.perf_counter() - begin)
        comm.barrier()
        if rank == 0:
            (Path(folder) / "0.json").write_text(json.dumps(times))
        server.buf.close()


def summary(kills, mores, joins, cost):
    """Summarize the kills and joins: medians, worst times, and numbers that must be 0."""
    known = [{**k, **more} for k, more in zip(kills, mores, strict=True) if more["total_s"] is not None]
    medians = {p: statistics.median(k[p] for k in known) for p in (*PARTS, "total_s")} if known else {}
    leaks = ("failed", "leaked_files", "leaked_descriptors", "leaked_bytes")
    joined = [j for j in joins if "join_s" in j]
    return {
        "kills": len(kills),
        **{f"median_{p}": round(seconds, 4) for p, seconds in medians.items()},
        "worst_total_s": max((k["total_s"] for k in known), default=None),
        "wrong": sum(each["wrong"] for each in [*kills, *joins]),
        "hung": sum(each["hung"] for each in [*kills, *joins]),
        "more_than_one_verdict": sum(k["verdicts"] != 1 for k in kills),
        **{name: sum(more[name] for more in mores) for name in leaks},
        "median_join_s": round(statistics.median(j["join_s"] for j in joined), 4) if joined else None,
        "longest_step_while_joining": max((j["longest_meanwhile"] for j in joined), default=None),
        "static_cost": None if cost is None else round(cost, 4),
    }


def main(args):
    """Print one line per kill and write the report. The exit status is 1 if a number that must be 0 is not."""
    case = cases.Case(
        nodes=args.ranks // args.ranks_per_node,
        ranks_per_node=args.ranks_per_node,
        hidden=args.hidden,
        tokens=args.tokens,
        experts=args.experts,
        top_k=args.top_k,
        routing=args.routing,
    )
    context = get_context("forkserver")
    context.set_forkserver_preload(["bench.elastic"])
    kinds, kills, mores, joins = [k.strip() for k in args.victims.split(",") if k.strip()], [], [], []
    unknown = [k for k in kinds if k not in VICTIMS]
    if unknown:
        raise SystemExit(f"--victims has {unknown[0]!r}; expected some of {', '.join(VICTIMS)}")
    for i in range(args.kills):
        for j, kind in enumerate(kinds):
            found, more, reports, killed = kill(case, kind, args.seed + i * len(kinds) + j, context)
            kills.append(found)
            mores.append(more)
            print(json.dumps(found), flush=True)
            if args.plot and not args.joins and not i and not j:
                plot(args.plot, case, [r["stamps"] for r in reports], [("kill -9", at) for at in killed])
    for i in range(args.joins):
        found, served, events = join(case, args.seed + i, context)
        joins.append(found)
        print(json.dumps(found), flush=True)
        if args.plot and not i and not found["hung"]:
            plot(args.plot, case, served, events)
    cost = static_cost(case, args.steps, context) if args.steps else None
    result = summary(kills, mores, joins, cost)
    print(json.dumps({"summary": result}), flush=True)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"kills": kills, "joins": joins, "summary": result}, indent=1) + "\n"
        )
    zero = ("wrong", "hung", "failed", "more_than_one_verdict")
    return int(any(result[name] for name in [*zero, *(n for n in result if n.startswith("leaked"))]))
