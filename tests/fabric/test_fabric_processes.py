"""A Domain between processes: mapped memory, UCX between nodes, and ranks that are killed or stopped."""

import json
import os
import random
import time

import fabric_worker
import pytest

SIZE, VICTIM = 4, 1
RAILS = {
    "mapped": ({}, True),
    "not mapped": ({"MOECOMM_UCX_DIRECT": "0"}, False),
    "tcp": ({"MOECOMM_UCX_DIRECT": "0", "UCX_TLS": "tcp,self"}, False),
}


def run_ranks(processes, target, folder, per_node, environment, *rest):
    """Start the ranks; always kill them at the end."""
    ranks = [
        processes.Process(target=target, args=(str(folder), r, SIZE, per_node, environment, *rest))
        for r in range(SIZE)
    ]
    for p in ranks:
        p.start()
    return ranks


def join_all(ranks, but=None, seconds=60):
    deadline = time.monotonic() + seconds
    try:
        for r, p in enumerate(ranks):
            if r != but:
                p.join(max(0, deadline - time.monotonic()))
                assert p.exitcode == 0, f"rank {r} ended with {p.exitcode} (None: it hangs)"
    finally:
        for p in ranks:
            p.kill()
            p.join()


@pytest.mark.parametrize("rail", RAILS)
def test_random_programs_between_processes(processes, tmp_path, rail):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    join_all(
        run_ranks(processes, fabric_worker.run_program, tmp_path, 2, RAILS[rail][0], seed, RAILS[rail][1])
    )


KILLS = [
    ("ring", "copy", 2, "mapped"),
    ("ring", "wait", 3, "mapped"),
    ("ring", "put", 2, "tcp"),
    ("multicast", "copy", 30, "mapped"),
    ("multicast", "wait", 5, "tcp"),
    ("reduce", "reduce", 5, "mapped"),
    ("reduce", "wait", 9, "tcp"),
]


@pytest.mark.parametrize("verb,point,passes,rail", KILLS)
def test_every_survivor_of_a_killed_rank_raises(processes, tmp_path, verb, point, passes, rail):
    per_node = 1 if point == "put" else 2
    phase = (
        {"ring": "arrive", "multicast": "announce", "reduce": "announce"}[verb] if point == "wait" else "none"
    )
    fault = {"point": point, "action": "kill", "passes": passes, "phase": phase}
    before = set(os.listdir("/dev/shm"))
    ranks = run_ranks(
        processes, fabric_worker.survive, tmp_path, per_node, RAILS[rail][0], verb, VICTIM, fault
    )
    join_all(ranks, but=VICTIM)
    assert {n for n in os.listdir("/dev/shm") if n.startswith(("moecomm", "ucx"))} <= before
    for r in range(SIZE):
        if r == VICTIM:
            continue
        seen = json.loads((tmp_path / f"{r}.json").read_text())
        e = seen["error"]
        assert e["type"] == "PeerLost" and e["peer"] == VICTIM and e["rank"] == r, e
        assert e["op"] in (verb, "write", "wait") and e["phase"] not in (None, "none"), e
        assert seen["seconds"] < fabric_worker.TIMEOUT, e  # reported at once, not at the deadline
        assert seen["again"]["type"] == "PeerLost" and seen["again_seconds"] < 0.5
        assert seen["close_seconds"] < 2, seen


def test_every_rank_gives_up_on_a_stopped_one(processes, tmp_path):
    fault = {"point": "wait", "action": "stop", "passes": 4, "phase": "announce"}
    ranks = run_ranks(processes, fabric_worker.survive, tmp_path, 2, {}, "multicast", VICTIM, fault)
    join_all(ranks, but=VICTIM)
    for r in range(SIZE):
        if r != VICTIM:
            seen = json.loads((tmp_path / f"{r}.json").read_text())
            assert seen["error"]["type"] == "PeerTimeout", seen
            assert seen["seconds"] < fabric_worker.TIMEOUT + 3, seen
