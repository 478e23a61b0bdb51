"""Ranks die or stop at named points while others join: no rank waits for them, and all results are correct."""

import json
import os
import signal
import time

import join_deaths
import pytest
from join_deaths import NEW, OLD, SIZE, WAITS
from rank_processes import finish, started


def world(processes, folder, *, per_node=3, new, old=None, action="kill", timeout=WAITS, at_once=False):
    """What every rank saw at the end. new: the point at which the first new rank strikes, None: it lives; old: (rank,
    point).

    Processes that die are known to be dead, so timeouts are longer than the test may take.
    """
    progress = processes.Array("l", 2 * (SIZE + 2), lock=False)
    last = processes.Value("l", 0, lock=False)
    victim, point = old or (None, None)
    rest = (action, progress, last)
    jobs = [
        (join_deaths.main, (str(folder), r, per_node, timeout, victim, point, *rest)) for r in range(SIZE)
    ]
    jobs += [(join_deaths.fresh, (str(folder), 0, False, new, *rest))]
    if new is not None:
        jobs += [(join_deaths.fresh, (str(folder), 1, not at_once, None, *rest))]
    gone = {victim} if new is None else {SIZE}
    here = [r for r in range(len(jobs)) if r not in gone]
    with started(processes, jobs) as ranks:
        end = time.monotonic() + 150
        while any(progress[2 * r + 1] != len(here) for r in here):
            ended = {r: ranks[r].exitcode for r in here if ranks[r].exitcode is not None}
            assert not ended, f"{ended}: processes ended before the others were together"
            sizes = [list(progress[2 * r : 2 * r + 2]) for r in here]
            assert time.monotonic() < end, f"steps and sizes of {here}: {sizes}"
            time.sleep(0.005)
        if action == "stop":
            os.kill(int((folder / "struck").read_text()), signal.SIGCONT)
        last.value = max(progress[2 * r] for r in here) + 4

        finish(ranks, gone if action == "kill" else ())
    assert (folder / "struck").exists()
    seen = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
    names = [str(r) for r in here if r < SIZE] + [f"new{r - SIZE}" for r in here if r >= SIZE]
    assert len({json.dumps(seen[name]["members"]) for name in names}) == 1, seen
    return seen


@pytest.mark.parametrize("point", NEW)
def test_a_new_rank_dies(processes, tmp_path, point):
    """Serving goes on without it, and the next one is let in."""
    world(processes, tmp_path, new=point)


@pytest.mark.parametrize("rank", [0, 1])  # new ranks wait at rank 1
@pytest.mark.parametrize("point", OLD)
def test_a_rank_that_serves_dies(processes, tmp_path, rank, point):
    """The others go on without it, and the new rank is let in by them, perhaps in a second attempt."""
    world(processes, tmp_path, new=None, old=(rank, point))


@pytest.mark.parametrize("point", ["let in", "window", "told admit", "active"])
def test_one_of_two_new_ranks_dies(processes, tmp_path, point):
    world(processes, tmp_path, new=point, at_once=True)


def test_between_nodes(processes, tmp_path):
    world(processes, tmp_path, per_node=1, new=None, old=(0, "telling ready"))


@pytest.mark.parametrize("point", ["let in", "told admit"])
def test_a_new_rank_stops(processes, tmp_path, point):
    """It is not waited for beyond the timeout; when it goes on, an error says that it is not one of them."""
    seen = world(processes, tmp_path, new=point, action="stop", timeout=8.0)
    assert seen["new0"]["type"] in ("PeerLost", "PeerTimeout", "Excluded"), seen["new0"]
