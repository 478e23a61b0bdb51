"""The part of `bench elastic` in which new ranks join: how long it takes, and how long the others' steps are meanwhile.

Each join has a new world, in which a rank is killed and a new one takes its place. A step is a retry and an admit here.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

import moecomm

from .elastic_world import DEADLINE, TIMEOUT, Server

STEPS = 40  # before the new rank calls, and after it is active


def join(case, seed, context):
    """Run one world with a join; return (object for the report, times of the steps by rank, events for the plot)."""
    victim = random.Random(seed).randrange(case.ranks)
    others = [r for r in range(case.ranks) if r != victim]
    progress, last = context.Array("l", case.ranks + 1, lock=False), context.Value("l", 0, lock=False)
    with tempfile.TemporaryDirectory() as folder:
        rest = (case, seed, victim, progress, last)
        ranks = [context.Process(target=_admit, args=(folder, r, *rest)) for r in range(case.ranks)]
        new = context.Process(target=_come, args=(folder, *rest))
        serving = [ranks[r] for r in others]
        for p in ranks:
            p.start()
        try:
            _until(ranks, lambda: min(progress[: case.ranks]) >= 10)
            ranks[victim].kill()
            killed, at = time.monotonic(), max(progress)
            _until(serving, lambda: min(progress[r] for r in others) >= at + STEPS)
            new.start()
            _until([*serving, new], lambda: progress[case.ranks] > 0)
            last.value = max(progress) + STEPS
            for p in [*serving, new]:
                p.join(DEADLINE)
            reports = {p.stem: json.loads(p.read_text()) for p in Path(folder).glob("*.json")}
        finally:
            for p in ranks if new.pid is None else [*ranks, new]:
                p.kill()
                p.join()
    served = [reports[str(r)]["stamps"] for r in others if str(r) in reports]
    found = {"wrong": sum(r["wrong"] for r in reports.values()), "hung": len(others) + 1 - len(reports)}
    if found["hung"]:
        return found, served, [("kill -9", killed)]
    called, active = reports["new"]["called"], reports["new"]["active"]
    before = [s for stamps in served for s in _steps(stamps, killed, called)[-STEPS // 2 :]]
    meanwhile = [s for stamps in served for s in _steps(stamps, called, active)]
    usual = statistics.median(before)
    found |= {
        "join_s": round(active - called, 4),
        "step_s": round(usual, 4),
        "longest_before": round(max(before) / usual, 2),
        "longest_meanwhile": round(max(meanwhile) / usual, 2),
    }
    served.append(reports["new"]["stamps"])
    return found, served, [("kill -9", killed), ("join", called), ("active", active)]


def _until(processes, done):
    end = time.monotonic() + DEADLINE
    while not done() and time.monotonic() < end and all(p.exitcode is None for p in processes):
        time.sleep(0.002)


def _steps(stamps, begin, end):
    """Seconds of the steps that are under way between two times."""
    return [b - a for (a, _), (b, _) in itertools.pairwise(stamps) if b > begin and a < end]


def _admit(folder, rank, case, seed, victim, progress, last):
    """Serve and let others in. Write FOLDER/RANK.json."""
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
    comm = moecomm.Communicator(dist.group.WORLD, ranks_per_node=case.ranks_per_node, timeout=TIMEOUT)
    server = Server(comm, case, seed, rank)
    if rank == (victim + 1) % case.ranks:
        (Path(folder) / "address").write_text(comm.address)
    _serve(folder, server, str(rank), rank, victim, progress, last)


def _come(folder, case, seed, victim, progress, last):
    """Join, and serve. Write FOLDER/new.json."""
    torch.set_num_threads(1)
    called = time.monotonic()
    comm = moecomm.Communicator.join((Path(folder) / "address").read_text(), timeout=TIMEOUT)
    server = Server(comm, case, seed, victim, comm.offered[0])
    comm.admit()
    times = {"called": called, "active": time.monotonic()}
    _serve(folder, server, "new", case.ranks, victim, progress, last, **times)


def _serve(folder, server, name, slot, victim, progress, last, **times):
    comm, stamps, wrong = server.comm, [], 0
    server.seats[server.case.ranks] = victim
    while not last.value or comm.steps < last.value:
        y, lost = comm.retry(server.step)
        wrong += server.wrong(y, lost)
        comm.admit()
        stamps.append((time.monotonic(), comm.generation))
        progress[slot] = comm.steps
    (Path(folder) / f"{name}.json").write_text(json.dumps({"stamps": stamps, "wrong": wrong, **times}))
    server.buf.close()
    comm.close()
