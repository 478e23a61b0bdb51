"""The same Communicator and Buffer continue when ranks are killed; each result is correct or an error."""

import json

import lasting_worker
import pytest
from rank_processes import run

import moecomm

# [step, rank, moment]; tests/ranks/test_failures.py explains fault points.
SCRIPTS = {
    "one after another": (2, [[2, 3, "between steps"], [4, 0, "copy 5"], [6, 2, "reduce 3"]]),
    "a gateway, then rank 0 in the agreement": (2, [[2, 1, "put 1"], [2, 0, "agreement"]]),
    "a whole node at once": (2, [[2, 2, "between steps"], [2, 3, "between steps"]]),
    "while going on": (2, [[2, 0, "copy 9"], [2, 3, "renewal"]]),
    "in one node": (4, [[2, 1, "copy 7"], [3, 2, "copy 1"], [4, 0, "reduce 0"]]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_survivors_go_on(processes, tmp_path, name):
    per_node, script = SCRIPTS[name]
    victims = {rank for _, rank, _ in script}
    seen = run(processes, tmp_path, lasting_worker.main, 4, (4, per_node, None, script, 9), victims)
    for s in seen.values():
        assert s["members"] == sorted(seen) and s["size"] == len(seen)
        assert s["generations"][-1] <= len(script) and s["rows"] == 9 * lasting_worker.TOKENS
        assert sum(s["lost"]) > 0 and not any(s["lost"][:2])
    assert len({s["generations"][-1] for s in seen.values()}) == 1


def test_a_step_that_one_rank_has_not_completed_is_repeated_by_all(processes, tmp_path):
    seen = run(processes, tmp_path, lasting_worker.behind, 4, (4, 2), {3})
    for rank, s in seen.items():
        first = [[0, 0], [1, 0]] if rank == 1 else [[0, 0], [1, 0], [2, 0]]
        assert s == {"ran": [*first, [1, 1], [2, 1], [3, 1]], "generation": 1}, f"rank {rank}"


def test_replicas_serve_lost_experts(processes, tmp_path):
    """Every expert is on two ranks: the first lost rank loses no weight."""
    table = [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 0, 1]  # four slots on each of four ranks
    script = [[2, 2, "copy 3"], [5, 0, "between steps"]]
    seen = run(processes, tmp_path, lasting_worker.main, 4, (4, 2, table, script, 8), {0, 2})
    for s in seen.values():
        assert s["generations"] == [0] * 2 + [1] * 3 + [2] * 3
        assert not any(s["lost"]), "ranks 1 and 3 have all eight experts"


@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_of_an_earlier_generation_is_refused_by_name(processes, tmp_path, lazy):
    """lazy: the shape of the Buffer comes with its calls."""
    seen = run(processes, tmp_path, lasting_worker.stale, 4, (4, 2, lazy), {3})
    assert len({json.dumps(s["verdict"]) for s in seen.values()}) == 1
    for s in seen.values():
        assert s["verdict"][:2] == [[0, 1, 2], [3]]
        assert "ranks [3] are lost" in s["text"] and "generation 1" in s["text"]
        for name in ("combine", "dispatch", "wait", "decode"):
            assert (
                "belongs to a generation that has ended; expected one of the present generation 1" in s[name]
            ), (name, s[name])


def test_rank_threads_are_refused():
    def main(comm):
        with pytest.raises(moecomm.InvalidArgument, match="threads of one process"), comm.elastic():
            pass

    moecomm.run_local(main, 2)


def test_alone():
    with moecomm.Communicator("alone") as comm:
        assert comm.retry(lambda: 7) == 7 and comm.generation == 0 and comm.members == (0,)
