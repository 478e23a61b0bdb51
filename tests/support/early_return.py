"""The program of one rank process of test_deep_ep_async.py: rank 1 stops when its counts are sent and no row is."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from counts_first import state_of
from deep_ep_oracle import layout_and_dispatch
from survivors import describe, join

import moecomm
from moecomm.integrations import deep_ep

SIZE, EXPERTS, TOP_K, HIDDEN, TOKENS = 2, 8, 4, 64, 24


class Normal:
    """deep_ep.Buffer."""

    def __init__(self, comm):
        self.buffer = deep_ep.Buffer(comm)

    def dispatch(self, x, ids, handle=None, later=True):
        """Return (rows, handle, event)."""
        if handle is None:
            out = layout_and_dispatch(self.buffer, x, ids, torch.ones(ids.shape), EXPERTS, async_finish=later)
            return out[0], out[4], out[5]
        out = self.buffer.dispatch(x, handle=handle, async_finish=later)
        return out[0], handle, out[5]


class Elastic:
    """deep_ep.ElasticBuffer."""

    expand = False

    def __init__(self, comm):
        self.buffer = deep_ep.ElasticBuffer(
            comm, num_max_tokens_per_rank=TOKENS, hidden=HIDDEN, num_topk=TOP_K
        )

    def dispatch(self, x, ids, handle=None, later=True):
        how = (
            dict(handle=handle) if handle else dict(topk_idx=ids, num_experts=EXPERTS, do_expand=self.expand)
        )
        out = self.buffer.dispatch(x, async_with_compute_stream=later, **how)
        return out[0], out[3], out[4]


class Expanded(Elastic):
    """With a row per expert."""

    expand = True


KINDS = {kind.__name__: kind for kind in (Normal, Elastic, Expanded)}


def main(folder, rank, kind, ending):
    """Dispatch once, with a stop in it. Writes FOLDER/RANK.json.

    ending: rank 1 is continued, or killed; then rank 0 waits for the event, or combines without that.
    """
    folder = Path(folder)
    comm = moecomm.Communicator(join(folder, "first", rank, SIZE), timeout=30.0)
    pids = comm.exchange(os.getpid())
    calls = KINDS[kind](comm)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    x = torch.randint(-8, 8, (TOKENS, HIDDEN), generator=generator).to(torch.bfloat16)
    want, first, event = calls.dispatch(x, ids, later=False)
    want = want.clone()
    assert event.event is None
    comm.barrier()
    if rank == 1:
        calls.buffer.world.last[False].backend.memory.native.set_fault("wait", "stop", 0, "counts")
    seen = {}
    rows, handle, event = calls.dispatch(x, ids)
    if rank == 0:
        deadline = time.monotonic() + 10
        while (state := state_of(pids[1])) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        seen["stopped"] = state
        seen["shape"] = rows.shape == want.shape
        if kind != "Normal":
            mine = handle.num_unaligned_recv_tokens_per_expert, first.num_unaligned_recv_tokens_per_expert
            seen["counts"] = torch.equal(*mine)
        os.kill(pids[1], signal.SIGCONT if ending == "continued" else signal.SIGKILL)
    try:
        if ending == "killed, combined":
            calls.buffer.combine(rows, handle)
        else:
            event.current_stream_wait()
        seen["rows"] = torch.equal(rows, want)
        if kind != "Normal":
            seen["received"] = handle.num_recv_tokens == first.num_recv_tokens
        again, _, event = calls.dispatch(x + 1, ids, handle)
        y = calls.buffer.combine(rows, handle)[0]  # without a wait for the event before
        seen["again"] = torch.equal(again, want + 1)
        seen["combined"] = torch.equal(y, calls.buffer.combine(want, first)[0])
        comm.barrier()
    except moecomm.MoecommError as error:
        seen["error"] = describe(error)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    os._exit(0)
