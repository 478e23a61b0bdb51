"""A rank is stopped for longer than the timeout and continued: its error says that it was late, and it lives on."""

import json
import os
import signal
import time

import pytest
import stopped

WORLDS = {"node": (4, {}), "tcp": (2, {"UCX_TLS": "tcp,self"})}


class World:
    """Four rank processes."""

    def __init__(self, processes, folder, kind, moment):
        self.folder = folder
        folder.mkdir()
        per_node, environment = WORLDS[kind]
        self.ranks = [
            processes.Process(target=stopped.main, args=(str(folder), r, per_node, moment, environment))
            for r in range(stopped.SIZE)
        ]
        for p in self.ranks:
            p.start()

    def send(self, number):
        os.kill(self.ranks[stopped.VICTIM].pid, number)

    def wait_until_armed(self):
        deadline = time.monotonic() + 60
        while not (self.folder / "armed").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def results(self):
        """Return the observations of all ranks."""
        deadline = time.monotonic() + 40
        for r, p in enumerate(self.ranks):
            p.join(max(0, deadline - time.monotonic()))
            assert p.exitcode == 0, f"rank {r} ended with {p.exitcode} (None: it hangs)"
        return [json.loads((self.folder / f"{r}.json").read_text()) for r in range(stopped.SIZE)]

    def end(self):
        for p in self.ranks:
            p.kill()
            p.join()


@pytest.mark.parametrize(
    "moments",
    [{"node": "inside", "tcp": "busy"}, {"node": "between", "tcp": "between"}],
    ids=["inside a call", "between calls"],
)
def test_a_stopped_rank_blames_itself(processes, tmp_path, moments):
    worlds = {kind: World(processes, tmp_path / kind, kind, moment) for kind, moment in moments.items()}
    try:
        for world in worlds.values():
            world.wait_until_armed()
        time.sleep(0.3)
        for world in worlds.values():
            world.send(signal.SIGSTOP)
        time.sleep(2 * stopped.TIMEOUT)
        for world in worlds.values():
            world.send(signal.SIGCONT)
        for kind, world in worlds.items():
            seen = world.results()
            victim = seen[stopped.VICTIM]
            assert victim["type"] == "PeerTimeout" and victim["peer"] == stopped.VICTIM, f"{kind}: {victim}"
            assert "this rank made no progress for" in victim["text"] and victim["reporter"] not in (
                None,
                stopped.VICTIM,
            ), f"{kind}: {victim}"
            others = [s for r, s in enumerate(seen) if r != stopped.VICTIM]
            assert all(s["type"] == "PeerTimeout" for s in others) and stopped.VICTIM in {
                s["peer"] for s in others
            }, f"{kind}: {seen}"
            assert all(s["close_seconds"] < 3 for s in seen), f"{kind}: {seen}"
    finally:
        for world in worlds.values():
            world.end()
