"""New ranks join a world that serves, and ranks leave it; all results are correct."""

import json

import growing_worker
import pytest
from rank_processes import finish, started

import moecomm


def run(processes, folder, size, arguments, new, *, victims=()):
    """Return the observations by name."""
    jobs = [(growing_worker.main, (str(folder), r, size, *arguments)) for r in range(size)]
    jobs += [(growing_worker.fresh, (str(folder), i)) for i in range(new)]
    with started(processes, jobs) as ranks:
        finish(ranks, victims)
    return {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}


def test_a_new_rank_takes_the_place_of_a_lost_one(processes, tmp_path):
    (tmp_path / "leaver").write_text("0")
    seen = run(processes, tmp_path, 4, (2, 1, 1, 0), 1, victims={1})
    assert sorted(seen) == ["0", "2", "3", "new0"]
    for s in seen.values():
        assert s["members"] == [0, 4, 2, 3] and s["nodes"] == [2, 2], "in the lost rank's node"
        assert s["after"] == [0.0] * 4, "it has the lost experts"
    assert all(sum(seen[r]["lost"]) > 0 for r in "023"), "no rank had them before"
    assert seen["0"]["left"] == "is closed: this rank has left"
    for name in ("2", "3", "new0"):
        assert seen[name]["members_at_the_end"] == [4, 2, 3]
        assert len(seen[name]["left"]) == 3 and sum(seen[name]["left"]) > 0, "rank 0 took its experts along"


def test_what_is_no_address_is_refused():
    with pytest.raises(moecomm.InvalidArgument, match="address"):
        moecomm.Communicator.join("tcp://somewhere")
    with (
        moecomm.Communicator("alone") as comm,
        pytest.raises(moecomm.InvalidArgument, match="made with a single rank"),
    ):
        _ = comm.address
