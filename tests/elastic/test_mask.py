"""Buffer.mask between real processes: ranks are killed inside decode steps, and the others go on."""

import json
import time

import mask_worker
import pytest
from rank_processes import finish, run, started

SEND = {
    "point": "copy",
    "action": "kill",
    "passes": 40,
}  # a part of its rows is staged, and no flag is written
ARRIVE = {"point": "wait", "action": "kill", "passes": 9, "phase": "arrive"}
ANSWERS = {"point": "wait", "action": "kill", "passes": 5, "phase": "sum"}
SUM = {"point": "reduce", "action": "kill", "passes": 30}


@pytest.mark.parametrize("travel", [False, True])
@pytest.mark.parametrize(
    "victims,faults", [([2, 0], [SEND, ARRIVE]), ([0, 3], [ANSWERS, SUM]), ([1], [None])]
)
def test_survivors_of_a_kill_go_on_with_the_same_memory(processes, tmp_path, victims, faults, travel):
    seen = run(processes, tmp_path, mask_worker.main, mask_worker.SIZE, (victims, faults, travel), victims)
    for s in seen.values():
        assert s["masked"] == sorted(victims) and s["lost"] == victims
        assert max(s["seconds"]) < mask_worker.TIMEOUT / 2


def test_a_rank_that_is_stopped_is_not_masked(processes, tmp_path):
    with started(processes, [(mask_worker.stopped, (str(tmp_path), r, 1)) for r in range(3)]) as ranks:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"{r}.json").exists() for r in (0, 2)) and time.monotonic() < deadline:
            time.sleep(0.01)
        ranks[1].kill()
        finish(ranks, [1])
    for r in (0, 2):
        step, mask = json.loads((tmp_path / f"{r}.json").read_text())
        assert step["type"] == "PeerTimeout" and step["peer"] == 1
        assert mask["type"] == "InvalidArgument" and "no rank knows that rank 1 is dead" in mask["text"]
