"""The program of one rank process of tests/elastic/test_mask.py."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from masked import check, oracle, step
from survivors import describe, join
from worlds import random_world

import moecomm

SIZE, TOKENS, HIDDEN, K, TIMEOUT = 4, 12, 64, 3, 30.0


def main(folder, rank, victims, faults, travel):
    """Make steps; the victims die one after another, each at its fault, and the others mask them and go on.

    Writes FOLDER/RANK.json.
    """
    folder, seen, masked = Path(folder), {"lost": [], "seconds": []}, ()
    comm = moecomm.Communicator(join(folder, "first", rank, SIZE), timeout=TIMEOUT)
    buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=2 * SIZE, top_k=K, max_tokens=TOKENS, decode=True)
    windows = buf.backend.memory.decode.native.window()

    def steps(seeds):
        for seed in seeds:
            xs, ids, weights = random_world(SIZE, TOKENS, HIDDEN, 2 * SIZE, K, seed=seed)
            want = oracle(masked, xs, ids, weights, 2 * SIZE, TOKENS, SIZE, travel)
            check(rank, *step(buf, xs[rank], ids[rank], weights[rank], travel), *want, f"step {seed}")

    steps(range(3))
    for round, (victim, fault) in enumerate(zip(victims, faults)):
        if rank == victim:
            if fault is None:
                os.kill(os.getpid(), signal.SIGKILL)
            buf.backend.memory.decode.native.set_fault(**fault)
        begin = time.monotonic()
        try:
            steps(range(100 * round + 10, 100 * round + 60))
        except moecomm.PeerLost as error:
            seen["lost"].append(error.peer)
        verdict = comm.agree()
        assert verdict.lost == tuple(sorted(victims[: round + 1])), verdict
        buf.mask(verdict.lost)
        masked = verdict.lost
        seen["seconds"].append(time.monotonic() - begin)
        steps(range(100 * round + 60, 100 * round + 80))
    assert buf.masked == masked and buf.backend.memory.decode.native.window() == windows
    seen["masked"] = list(masked)
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def stopped(folder, rank, victim):
    """The victim stops: it cannot be masked, because it may run again."""
    folder = Path(folder)
    comm = moecomm.Communicator(join(folder, "first", rank, 3), timeout=2.0)
    buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=6, top_k=K, max_tokens=TOKENS, decode=True)
    xs, ids, weights = random_world(3, TOKENS, HIDDEN, 6, K, seed=1)
    step(buf, xs[rank], ids[rank], weights[rank])
    if rank == victim:
        (folder / "stops").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    while not (folder / "stops").exists():
        time.sleep(0.01)
    errors = []
    for call in (lambda: step(buf, xs[rank], ids[rank], weights[rank]), lambda: buf.mask([victim])):
        try:
            call()
        except moecomm.MoecommError as error:
            errors.append(describe(error))
    (folder / f"{rank}.json").write_text(json.dumps(errors))
