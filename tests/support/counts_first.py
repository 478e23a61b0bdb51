"""The program of one rank process of test_counts_first.py: rank 1 stops when its counts are sent and no row is."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import torch
from survivors import describe, join
from worlds import assert_received, random_world

import moecomm
from moecomm import reference

SIZE, EXPERTS, TOP_K = 2, 8, 4
TIMEOUTS = {"continued": 30.0, "killed": 30.0, "left alone": 4.0}


def state_of(pid):
    """State of a process: T if it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def main(folder, rank, per_node, ending):
    """Dispatch once, with a stop in it. ending: rank 1 is continued, killed or left alone. Writes FOLDER/RANK.json."""
    folder = Path(folder)
    comm = moecomm.Communicator(
        join(folder, "first", rank, SIZE), ranks_per_node=per_node, timeout=TIMEOUTS[ending]
    )
    pids = comm.exchange(os.getpid())
    buf = moecomm.Buffer(comm, hidden=64, num_experts=EXPERTS, top_k=TOP_K, max_tokens=24)
    xs, ids, weights = random_world(SIZE, 24, 64, EXPERTS, TOP_K, seed=7)
    want = reference.dispatch(xs, ids, weights, num_experts=EXPERTS, layout="expert")[rank]
    buf.dispatch(torch.zeros_like(xs[rank]), ids[rank])
    comm.barrier()
    if rank == 1:  # it has told its counts when it stops; between nodes, its first put is about them
        buf.backend.memory.native.set_fault(
            *(("wait", "stop", 0, "counts") if per_node == 2 else ("put", "stop", 1))
        )
    pending = buf.dispatch(xs[rank], ids[rank], weights[rank], async_op=True)
    seen = {}
    if rank == 0:
        from_threads = []
        asking = [threading.Thread(target=lambda: from_threads.append(pending.wait_counts())) for _ in "ab"]
        for thread in asking:
            thread.start()
        early = pending.wait_counts()
        for thread in asking:
            thread.join()
        deadline = time.monotonic() + 10  # rank 1 stops after what tells its counts
        while (state := state_of(pids[1])) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        seen["stopped"] = state
        seen["done"] = pending.done()
        seen["counts"] = torch.equal(early.tokens_per_expert, want.tokens_per_expert)
        seen["rows"] = [early.handle.num_rows == len(want.x), early.x.shape == want.x.shape]
        seen["same"] = all(other is early for other in from_threads)
        address = early.x.data_ptr()
        if ending == "continued":
            os.kill(pids[1], signal.SIGCONT)
        elif ending == "killed":
            os.kill(pids[1], signal.SIGKILL)
    try:
        out = pending.wait()
        assert_received(out, want, rank)
        if rank == 0:
            seen["kept"] = out is early and out.x.data_ptr() == address
        comm.barrier()
    except moecomm.MoecommError as error:
        seen["error"] = describe(error)
        try:
            pending.wait_counts()
        except moecomm.MoecommError as again:
            seen["again"] = describe(again) == seen["error"]
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    os._exit(0)
