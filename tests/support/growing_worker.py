"""The program of one rank process of tests/elastic/test_growing.py."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from lasting_worker import EXPERTS_PER_RANK, HIDDEN, TIMEOUT, TOKENS, TOP_K, batch, descriptors
from survivors import join

import moecomm


class Serving:
    """Steps of one rank with the Buffer's current placement. Every result is compared."""

    def __init__(self, comm, buf, experts):
        self.comm, self.buf, self.experts = comm, buf, experts
        g = torch.Generator().manual_seed(1)
        self.scale = torch.randint(-4, 5, (experts, HIDDEN), generator=g).float()

    def placement(self):
        """Experts as [ranks, slots]."""
        router = self.buf.backend.router
        table = torch.arange(self.experts) if router is None else router.placement.physical_to_logical[0]
        return table.view(self.comm.size, -1)

    def step(self):
        """Serve one batch and compare it; return the lost weight."""
        number, x, ids, shares = self.comm.steps, None, None, None

        def run():
            x, ids, shares = batch(self.comm.members[self.comm.rank], number, self.experts)
            out = self.buf.dispatch(x, ids, shares)
            mine = self.scale[self.placement()[self.comm.rank]]
            rows = out.x * torch.repeat_interleave(mine, out.tokens_per_expert, 0)
            return self.buf.combine(rows, out.handle, topk_weights=out.topk_weights), out.lost_weight

        y, lost = self.comm.retry(run)
        x, ids, shares = batch(self.comm.members[self.comm.rank], number, self.experts)
        here = torch.zeros(self.experts, dtype=torch.bool)
        here[self.placement().flatten()] = True
        picked = shares * (ids >= 0)
        kept = picked * here[ids.clamp(min=0)]
        want = (x[:, None] * self.scale[ids.clamp(min=0)] * kept[..., None]).sum(1)
        assert torch.equal(y + 0.0, want + 0.0), f"step {number} of generation {self.comm.generation}"
        return 0.0 if lost is None else float(lost.sum())


def main(folder, rank, size, ranks_per_node, victim, new, leaver):
    """Serve until the victim dies, the new ranks have joined, and one rank has left. Writes FOLDER/RANK.json."""
    folder, seen = Path(folder), {"lost": []}
    comm = moecomm.Communicator(
        join(folder, "first", rank, size), ranks_per_node=ranks_per_node, timeout=TIMEOUT
    )
    experts = size * EXPERTS_PER_RANK
    arguments = dict(hidden=HIDDEN, num_experts=experts, top_k=TOP_K, max_tokens=TOKENS, dtype=torch.float32)
    serving = Serving(comm, moecomm.Buffer(comm, **arguments), experts)
    for _ in range(3):
        serving.step()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(2):
        seen["lost"].append(serving.step())
    if rank == comm.members[-1]:
        (folder / "address.new").write_text(comm.address)
        os.rename(folder / "address.new", folder / "address")
    go_on(folder, serving, seen, size - (victim is not None) + new, leaver)


def fresh(folder, number):
    """Run a new rank. Writes FOLDER/newNUMBER.json."""
    folder, seen = Path(folder), {"lost": []}
    while not (folder / "address").exists():
        time.sleep(0.01)
    comm = moecomm.Communicator.join((folder / "address").read_text(), timeout=TIMEOUT)
    buf = moecomm.Buffer(comm, **comm.offered[0])
    assert comm.admit() is True
    seen["uid"] = comm.members[comm.rank]
    serving = Serving(comm, buf, comm.offered[0]["num_experts"])
    go_on(folder, serving, seen, comm.size, seen.get("leaver"), f"new{number}")


def go_on(folder, serving, seen, size, leaver, name=None):
    """Serve until all ranks have joined, then four more steps, then after one rank has left."""
    comm, waited = serving.comm, 0
    while comm.size < size:
        assert serving.step() >= 0
        comm.admit()
        waited += 1
    seen["after"] = [serving.step() for _ in range(4)]
    seen["members"], seen["nodes"] = comm.members, [comm.num_nodes, comm.ranks_per_node]
    seen["waited"], seen["generation"] = waited, comm.generation
    leaving = [comm.members.index(leaver)] if leaver in comm.members else []
    uid = comm.members[comm.rank]
    if (folder / "leaver").exists():
        leaving = [comm.members.index(int((folder / "leaver").read_text()))]
        while not comm.admit(leaving):
            serving.step()
        if uid not in comm.members or comm.order.closed:
            seen["left"] = str(comm.order.closed)
        else:
            seen["left"] = [serving.step() for _ in range(3)]
    if not comm.order.closed:
        comm.barrier()
    seen["members_at_the_end"], seen["descriptors"] = comm.members, descriptors()
    (folder / f"{name or uid}.json").write_text(json.dumps(seen))
    comm.close()
