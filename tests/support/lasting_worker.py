"""The program of one rank process of tests/elastic/test_lasting.py."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
from survivors import join

import moecomm
from moecomm.balance import Placement

EXPERTS_PER_RANK, HIDDEN, TOKENS, TOP_K, TIMEOUT = 4, 16, 12, 4, 60.0


def batch(uid, step, experts):
    """Return (x, ids, shares) with whole numbers, so that sums are exact in any order; some picks are -1."""
    g = torch.Generator().manual_seed(1000 * step + uid)
    x = torch.randint(-3, 4, (TOKENS, HIDDEN), generator=g).float()
    ids = torch.rand((TOKENS, experts), generator=g).argsort(-1)[:, :TOP_K].contiguous()
    ids = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.1, -1)
    return x, ids, torch.randint(1, 5, (TOKENS, TOP_K), generator=g).float()


class Serving:
    """Steps of one rank. Every result is compared with the sum over the remaining experts."""

    def __init__(self, comm, size, table=None, lazy=False):
        self.comm, self.uid = comm, comm.rank
        experts = size * EXPERTS_PER_RANK if table is None else max(table) + 1
        self.table = torch.arange(experts) if table is None else torch.tensor(table)
        self.slots = self.table.view(size, -1)
        self.scale = torch.randint(
            -4, 5, (experts, HIDDEN), generator=torch.Generator().manual_seed(1)
        ).float()
        placement = None if table is None else Placement(self.table[None], experts, size, comm.num_nodes)
        self.experts = experts
        shape = dict(hidden=HIDDEN, top_k=TOP_K, max_tokens=TOKENS, dtype=torch.float32)
        self.said = dict(num_experts=experts) if lazy else {}  # in every call
        self.buf = (
            moecomm.Buffer(comm)
            if lazy
            else moecomm.Buffer(comm, num_experts=experts, placement=placement, **shape)
        )

    def step(self, number):
        """Run one batch; return (y, lost_weight)."""
        x, ids, shares = batch(self.uid, number, self.experts)
        out = self.buf.dispatch(x, ids, shares, **self.said)
        mine = self.scale[self.slots[self.uid]]
        rows = out.x * torch.repeat_interleave(mine, out.tokens_per_expert, 0)
        return self.buf.combine(rows, out.handle, topk_weights=out.topk_weights), out.lost_weight

    def decode_step(self, number):
        """As step, over the decode path."""
        x, ids, shares = batch(self.uid, number, self.experts)
        received, _ = self.buf.decode_dispatch(x, ids, return_hook=False, quant=None, **self.said)
        torch.mul(received.x, self.scale[self.slots[self.uid]][:, None], out=received.handle.rows)
        y, _ = self.buf.decode_combine(received.handle.rows, ids, shares, received.handle, return_hook=False)
        return y, self.buf.decode_lost_weight(ids, shares)

    def check(self, number, y, lost):
        """Compare a result with the experts of this generation."""
        x, ids, shares = batch(self.uid, number, self.experts)
        here = torch.zeros(self.experts, dtype=torch.bool)
        here[self.slots[list(self.comm.members)].flatten()] = True
        picked = shares * (ids >= 0)
        kept = picked * here[ids.clamp(min=0)]
        want = (x[:, None] * self.scale[ids.clamp(min=0)] * kept[..., None]).sum(1)
        assert torch.equal(y + 0.0, want + 0.0), f"step {number} of generation {self.comm.generation}"
        assert lost is None or torch.equal(lost, (picked - kept).sum(1)), f"step {number}"
        return 0.0 if lost is None else float(lost.sum())


def die_at(serving, moment):
    """Make this rank die at a given moment."""
    if moment == "between steps":
        os.kill(os.getpid(), signal.SIGKILL)
    elif moment in ("agreement", "renewal"):
        comm = serving.comm
        owner, name = {"agreement": (comm, "_report"), "renewal": (comm.collective, "join")}[moment]
        setattr(owner, name, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    else:
        point, passes = moment.split()
        serving.buf.backend.memory.native.set_fault(point=point, action="kill", passes=int(passes))


def descriptors():
    """Number of open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def main(folder, rank, size, ranks_per_node, table, script, steps):
    """Serve while ranks die as in the script [step, rank, moment]. Writes FOLDER/RANK.json."""
    folder, seen = Path(folder), {"lost": [], "generations": [], "rows": 0}
    comm = moecomm.Communicator(
        join(folder, "first", rank, size), ranks_per_node=ranks_per_node, timeout=TIMEOUT
    )
    serving = Serving(comm, size, table)
    buf = serving.buf
    for number in range(steps):
        for at, victim, moment in script:
            if at == number and victim == rank:
                die_at(serving, moment)
        y, lost = comm.retry(lambda n=number: serving.step(n))
        seen["lost"].append(serving.check(number, y, lost))
        seen["generations"].append(comm.generation)
        seen["rows"] += len(y)
    assert serving.buf is buf
    comm.barrier()
    seen["members"], seen["size"] = comm.members, comm.size
    seen["descriptors"] = descriptors()
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    buf.close()
    comm.close()


def behind(folder, rank, size, ranks_per_node):
    """The last rank dies when only rank 1 has not completed step 1: all survivors must repeat that step."""
    folder, ran = Path(folder), []
    comm = moecomm.Communicator(
        join(folder, "first", rank, size), ranks_per_node=ranks_per_node, timeout=TIMEOUT
    )
    serving = Serving(comm, size)

    def step(number):
        ran.append([number, comm.generation])
        result = serving.step(number)
        if ran[-1] == [1, 0] and rank == 1:
            comm.barrier()  # no other rank comes, and one of them dies
        return result

    for number in range(4):
        if number == 2 and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        y, lost = comm.retry(lambda n=number: step(n))
        serving.check(number, y, lost)
    (folder / f"{rank}.json").write_text(json.dumps({"ran": ran, "generation": comm.generation}))
    comm.barrier()
    serving.buf.close()
    comm.close()


def stale(folder, rank, size, ranks_per_node, lazy=False):
    """Objects of an old generation are refused by name; a Buffer with a decode path continues."""
    folder, seen = Path(folder), {}
    comm = moecomm.Communicator(
        join(folder, "first", rank, size), ranks_per_node=ranks_per_node, timeout=TIMEOUT
    )
    serving = Serving(comm, size, lazy=lazy)
    buf = serving.buf
    x, ids, shares = batch(rank, 0, serving.experts)
    out = buf.dispatch(x, ids, shares, **serving.said)
    pending = buf.dispatch(x, ids, shares, async_op=True)
    pending.wait()
    kept = out.x.clone()
    received, _ = buf.decode_dispatch(x, ids, return_hook=False, quant=None)
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with comm.elastic():
            late = buf.dispatch(x, ids, shares, async_op=True)
            late.wait()
    except moecomm.StepInterrupted as error:
        seen["verdict"] = [
            error.verdict.survivors,
            error.verdict.lost,
            error.verdict.completed,
            error.verdict.begun,
        ]
        seen["text"] = str(error)
    assert torch.equal(out.x, kept), "what was received stays readable"
    for name, call in {
        "combine": lambda: buf.combine(out.x, out.handle),
        "dispatch": lambda: buf.dispatch(x, handle=out.handle),
        "wait": late.wait,
        "decode": lambda: buf.decode_combine(received.x, ids, None, received.handle),
    }.items():
        try:
            call()
            seen[name] = "not refused"
        except moecomm.InvalidArgument as error:
            seen[name] = str(error)
    with comm.elastic():
        y, lost = serving.step(1)
        serving.check(1, y, lost)
        serving.check(2, *serving.decode_step(2))
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    comm.barrier()
    buf.close()
    comm.close()
