"""What one rank of tests/ranks/test_patience.py does, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from survivors import describe, join

import moecomm

SIZE, LATE, TIMEOUT, PAUSE = 2, 1, 4.0, 10.0


def main(folder, rank, per_node, patience, what):
    """One call of all ranks, to which rank LATE comes late, or not at all. Writes FOLDER/RANK.json."""
    folder = Path(folder)
    comm = moecomm.Communicator(
        join(folder, "group", rank, SIZE), ranks_per_node=per_node, timeout=TIMEOUT, patience=patience
    )
    buf = moecomm.Buffer(comm, hidden=64, num_experts=2 * SIZE, top_k=2, max_tokens=8)
    x, ids = torch.randn(8, 64).bfloat16(), torch.rand(8, 2 * SIZE).argsort(1)[:, :2].contiguous()
    comm.barrier()
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    seen = {"type": None}
    if rank == LATE and what == "closes":
        buf.close()
        comm.close()
    if rank == LATE:
        if what == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(PAUSE)
        if what in ("dies", "closes"):
            os._exit(0)
    try:
        out = buf.dispatch(x, ids)
        y = buf.combine(out.x, out.handle)
        assert torch.equal(y, 2 * x)
    except moecomm.MoecommError as error:
        seen = describe(error)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    os._exit(0)
