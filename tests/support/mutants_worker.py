"""Feeds damaged recordings or cluster tables to all their readers.

Arguments: kind, first seed, number of mutants, work folder. It prints each mutant before it is tried, so that the
last line names the one that killed the process. An alarm ends a reader that hangs. Any outcome except success and a
typed error that names the file is a failure with a traceback.
"""

import contextlib
import io
import json
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import mutants

import moecomm
from moecomm import clusters, record, replay, sim
from moecomm.__main__ import main as command

SECONDS = 60  # limit per mutant; one takes some milliseconds


def read(folder, seed):
    """Use a recording in all ways; return the outcome."""
    try:
        ranks = record.load(folder)
        script = replay.script_of(ranks)
    except moecomm.InvalidArgument as error:
        assert str(error).startswith("recording: ") and (
            "rank" in str(error) or str(folder) in str(error) or "no call" in str(error)
        ), error
        return "refused"
    try:
        replay.on_sim(script)
        if seed % 5 == 0:
            replay.on_cpu(script)
    except (moecomm.PeerTimeout, moecomm.PeerLost):
        raise  # a rank waited: the calls of the ranks do not match
    except moecomm.MoecommError as error:
        return type(error).__name__
    return "replayed"


def read_table(file):
    """Use a cluster's table; return the outcome."""
    try:
        machine = clusters.load(file)
    except moecomm.InvalidArgument as error:
        assert file.name in str(error), error
        return "refused"
    cluster = sim.Cluster(
        2, ranks_per_node=1, hidden=64, num_experts=8, top_k=2, max_tokens=4, hardware=machine.hardware
    )
    cluster.step([[[0, 4]], [[1, 5]]])
    return "simulated"


def main(kind, first, number, folder):
    """Try all mutants; return the exit status."""
    good, outcomes = folder / "good", Counter()
    if kind == "recording":
        mutants.good_recording(good)
        assert read(good, 0) == "replayed"
    text = (clusters.FOLDER / "h800.toml").read_text()
    for seed in range(first, first + number):
        rng = random.Random(seed)
        signal.alarm(SECONDS)
        if kind == "recording":
            what = mutants.damaged_copy(good, folder / "bad", rng)
            print(seed, what, flush=True)
            outcomes[read(folder / "bad", seed)] += 1
            if seed % 25 == 0:
                with (
                    contextlib.redirect_stdout(io.StringIO()),
                    contextlib.redirect_stderr(io.StringIO()),
                    contextlib.suppress(SystemExit),
                ):
                    command(["replay", str(folder / "bad"), "--world", "sim"])
        else:
            raw, what = mutants.damaged_table(text, rng)
            print(seed, what, flush=True)
            (folder / "bad.toml").write_bytes(raw)
            outcomes[read_table(folder / "bad.toml")] += 1
        signal.alarm(0)
    print("outcomes", json.dumps(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
