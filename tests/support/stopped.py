"""The program of one rank process of test_stopped.py: ranks are stopped and continued."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from survivors import describe, join

import moecomm

SIZE, VICTIM, TIMEOUT, PAUSE = 4, 1, 2.0, 1.0


def main(folder, rank, per_node, moment, environment):
    """Run round trips until the parent stops the victim: busy, waiting, or between calls. Writes FOLDER/RANK.json."""
    os.environ.update(environment)
    folder = Path(folder)
    comm = moecomm.Communicator(join(folder, "first", rank, SIZE), ranks_per_node=per_node, timeout=TIMEOUT)
    buf = moecomm.Buffer(comm, hidden=64, num_experts=4 * SIZE, top_k=4, max_tokens=24, channels=2)
    torch.manual_seed(rank)
    x, ids = torch.randn(24, 64).bfloat16(), torch.rand(24, 4 * SIZE).argsort(1)[:, :4].contiguous()

    def round_trip():
        out = buf.dispatch(x, ids)
        buf.combine(out.x, out.handle)

    round_trip()
    comm.barrier()
    seen = {}
    if rank == VICTIM:
        (folder / "armed").touch()
    if moment == "between" and rank == VICTIM:
        os.kill(os.getpid(), signal.SIGSTOP)  # before the parent does
    elif moment == "inside" and rank != VICTIM:
        time.sleep(PAUSE)
    try:
        while True:
            round_trip()
    except moecomm.MoecommError as error:
        seen = describe(error)
    began = time.monotonic()
    buf.close()
    comm.close()
    seen["close_seconds"] = time.monotonic() - began
    (folder / f"{rank}.json").write_text(json.dumps(seen))
