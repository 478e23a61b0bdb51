"""Ranks that die or stop: all survivors raise the right error in time, leak nothing, and continue in a new world."""

import json
import os
import signal
import threading
import time

import pytest
import survivors
import torch

import moecomm

SIZE, VICTIM = 4, 1
MODES = {
    "node": dict(ranks_per_node=4, environment={}),
    "rail": dict(ranks_per_node=1, environment={}),
    "both": dict(ranks_per_node=2, environment={}),
    "tcp": dict(ranks_per_node=2, environment={"UCX_TLS": "tcp,self"}),
}
# Where the victim fails: the point, and the number of passes before.
MOMENTS = {
    "before the plan": ("before", 0),
    "on the rail": ("put", 2),
    "while forwarding": ("copy", 9),
    "while reducing": ("reduce", 5),
}


def shared_memory_files():
    """Names in /dev/shm that belong to moecomm or UCX."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("moecomm", "ucx"))}


def run(processes, folder, *, point, action, passes=0, kill_after=None, ranks_per_node, environment):
    """Return the results of the survivors by rank."""
    before = shared_memory_files()
    fault = {"point": point, "action": action, "passes": passes}
    ranks = [
        processes.Process(
            target=survivors.main, args=(str(folder), r, SIZE, ranks_per_node, VICTIM, fault, environment)
        )
        for r in range(SIZE)
    ]
    for p in ranks:
        p.start()
    try:
        if kill_after is not None:
            deadline = time.monotonic() + 60
            while not (folder / "armed").exists() and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(kill_after)
            os.kill(ranks[VICTIM].pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        for r, p in enumerate(ranks):
            if r != VICTIM:
                p.join(max(0, deadline - time.monotonic()))
                assert p.exitcode == 0, f"rank {r} ended with {p.exitcode} (None: it hangs)"
    finally:
        for p in ranks:  # a stopped victim, or a rank that hangs
            p.kill()
            p.join()
    assert shared_memory_files() <= before
    return {r: json.loads((folder / f"{r}.json").read_text()) for r in range(SIZE) if r != VICTIM}


def check(seen, *, lost):
    """Check that all survivors raised the right error in time and named the victim."""
    for rank, s in seen.items():
        e = s["error"]
        where = f"rank {rank}: {e}"
        assert e["type"] == ("PeerLost" if lost else "PeerTimeout"), where
        assert (
            e["op"] in ("dispatch", "combine") and e["rank"] == rank and e["phase"] not in (None, "none")
        ), where
        assert e["expected"] is not None and e["got"] is not None and e["got"] < e["expected"], where
        assert e["peer"] is not None, where
        if lost:
            assert e["peer"] == VICTIM, where
            assert s["seconds"] < survivors.TIMEOUT, where  # reported at once, not at the deadline
        assert s["seconds"] < survivors.TIMEOUT + 2, where
        assert s["again"]["type"] == e["type"] and s["again_seconds"] < 0.5, where
        assert s["close_seconds"] < 2 and s["idle_cpu"] < 0.25 and s["closed_cpu"] < 0.15, f"rank {rank}: {s}"
        assert s["second world"]
    if not lost:
        assert VICTIM in {s["error"]["peer"] for s in seen.values()}, {
            r: s["error"]["text"] for r, s in seen.items()
        }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill(processes, tmp_path, moment, mode):
    point, passes = MOMENTS[moment]
    if mode == "node" and point == "put":
        pytest.skip("one node has no rail")
    check(run(processes, tmp_path, point=point, action="kill", passes=passes, **MODES[mode]), lost=True)


@pytest.mark.parametrize("mode", ["both", "tcp"])
@pytest.mark.parametrize("moment", ["before the plan", "while forwarding"])
def test_stop(processes, tmp_path, moment, mode):
    point, passes = MOMENTS[moment]
    check(run(processes, tmp_path, point=point, action="stop", passes=passes, **MODES[mode]), lost=False)


@pytest.mark.parametrize("milliseconds", [1, 7, 23])
def test_kill_at_any_moment(processes, tmp_path, milliseconds):
    """A busy rank is killed from outside, without a hook."""
    check(
        run(
            processes,
            tmp_path,
            point="random",
            action="kill",
            kill_after=milliseconds / 1000,
            **MODES["both"],
        ),
        lost=True,
    )


def test_ctrl_c_ends_rank_threads(ctrl_c):
    """The main thread waits for rank threads that wait for each other: it raises an error, and all threads end."""

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=16, num_experts=2, top_k=1, max_tokens=1)
        if comm.rank == 0:
            os.kill(os.getpid(), signal.SIGINT)
            buf.dispatch(torch.ones(1, 16).bfloat16(), torch.tensor([[0]]))
        else:
            comm.barrier()

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        moecomm.run_local(main, 2, timeout=30)
    assert time.monotonic() - began < 10 and not [
        t for t in threading.enumerate() if t.name.startswith("moecomm-rank") and t.is_alive()
    ]
