"""Communicator.agree between real processes that are killed, also during the agreement."""

import json
import os
import signal
import time

import agreeing
import pytest
import torch
from rank_processes import finish, run, started

import moecomm


@pytest.mark.parametrize(
    "victims,second,moment",
    [
        ([4], [], ""),
        ([0], [], ""),
        ([3, 4, 5], [], ""),
        ([2], [0], "first message"),
        ([0], [1], "verdict"),
        ([5], [0, 3], "accept"),
    ],
)
def test_survivors_reach_one_verdict(processes, tmp_path, victims, second, moment):
    gone = {*victims, *second}
    if moment == "accept":
        gone.discard(0)  # rank 0 leads, and accepts its own value
    seen = run(processes, tmp_path, agreeing.main, agreeing.SIZE, (victims, second, moment), gone)
    verdicts = {json.dumps(s["verdict"]) for s in seen.values()}
    assert len(verdicts) == 1, seen
    survivors, lost, completed, begun = next(iter(seen.values()))["verdict"]
    # A rank that died during the agreement may be among the survivors; the next agreement excludes it.
    assert (
        set(survivors) >= set(seen)
        and set(lost) >= set(victims)
        and sorted(survivors + lost) == list(range(6))
    )
    assert completed == 4 and begun == 5, (
        "two steps of two calls, and the dispatch in which the victims are missing"
    )
    for s in seen.values():
        assert s["again"] == [sorted(seen), sorted(gone)]


def test_a_rank_that_is_stopped_is_excluded(processes, tmp_path):
    with started(processes, [(agreeing.stopped, (str(tmp_path), r, 3)) for r in range(4)]) as ranks:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"{r}.there").exists() for r in range(3)) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(ranks[3].pid, signal.SIGCONT)
        ranks[3].join(60)
        (tmp_path / "stop").touch()
        finish(ranks)
    seen = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(4)]
    assert seen[0] == seen[1] == seen[2] == {"survivors": [0, 1, 2], "lost": [3]}
    assert seen[3]["type"] == "Excluded" and seen[3]["rank"] == 3


def test_rank_threads_are_refused():
    def main(comm):
        with pytest.raises(moecomm.InvalidArgument, match="threads of one process"):
            comm.agree()
        return float(torch.ones(1))

    assert moecomm.run_local(main, 2) == [1.0, 1.0]


def test_alone():
    with moecomm.Communicator("alone") as comm:
        verdict = comm.agree()
        assert verdict.survivors == (0,) and verdict.lost == () and verdict.completed == verdict.begun == 0
