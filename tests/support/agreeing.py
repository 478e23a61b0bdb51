"""The program of one rank process of tests/elastic/test_agree.py."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from survivors import describe, join

import moecomm
from moecomm._bootstrap import generations

SIZE, TIMEOUT = 6, 20.0


def dies(victims, rank, moment):
    """Kill this rank during the agreement: when the verdict is sent, or when the ballot begins."""
    if rank not in victims:
        return
    sent = []

    class Mortal(generations.Agreement):
        def start(self):
            mail = super().start()
            if moment == "first message":
                os.kill(os.getpid(), signal.SIGKILL)
            return mail

        def take(self, sender, message):
            mail = super().take(sender, message)
            if message[0] == generations.ACCEPT and moment == "accept":
                os.kill(os.getpid(), signal.SIGKILL)
            return mail

        def _decide(self, value):
            mail = super()._decide(value)
            if moment == "verdict":
                mail, sent[:] = mail[-1:] if not sent else [], [True]
            return mail

    if moment == "verdict":  # only one rank receives it
        real_end = generations.GenerationMesh._outcome

        def end(self, machine):
            os.kill(os.getpid(), signal.SIGKILL)
            return real_end(self, machine)

        generations.GenerationMesh._outcome = end
    generations.Agreement = Mortal


def main(folder, rank, victims, second, moment):
    """Run two steps, kill the victims, and kill the `second` ranks during the agreement. Writes FOLDER/RANK.json."""
    folder, seen = Path(folder), {}
    comm = moecomm.Communicator(join(folder, "first", rank, SIZE), ranks_per_node=3, timeout=TIMEOUT)
    buf = moecomm.Buffer(comm, hidden=64, num_experts=2 * SIZE, top_k=2, max_tokens=8)
    x, ids = torch.ones(8, 64).bfloat16(), torch.tensor([[rank, (rank + 5) % (2 * SIZE)]] * 8)

    def step():
        out = buf.dispatch(x, ids)
        return buf.combine(out.x, out.handle)

    step(), step()
    comm.barrier()
    dies(second, rank, moment)
    if rank in victims:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        while True:
            step()
    except moecomm.MoecommError as error:
        seen["error"] = describe(error)
    verdict = comm.agree()
    seen["seconds"] = time.monotonic() - began
    seen["verdict"] = [list(verdict.survivors), list(verdict.lost), verdict.completed, verdict.begun]
    again = comm.agree()
    seen["again"] = [list(again.survivors), list(again.lost)]
    left = comm.shrink(again.survivors)
    assert left.size == len(again.survivors)
    left.barrier()
    left.close()
    comm.close()
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def stopped(folder, rank, victim):
    """Stop the victim for longer than the timeout of the agreement. It must be excluded, and its error must say so."""
    folder = Path(folder)
    comm = moecomm.Communicator(join(folder, "first", rank, 4), ranks_per_node=4, timeout=60.0)
    comm.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGSTOP)
        seen = {}
        try:
            comm.agree()
        except moecomm.MoecommError as error:
            seen = describe(error)
    else:
        # A leader that waits longer for a silent rank than others wait for the leader is not given up.
        verdict = comm.agree(timeout=6.0 if rank == 0 else 2.0)
        seen = {"survivors": verdict.survivors, "lost": verdict.lost}
        (folder / f"{rank}.there").touch()
        while not (folder / "stop").exists():
            time.sleep(0.01)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
