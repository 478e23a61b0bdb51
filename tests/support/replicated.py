"""The program of one rank process of test_balance_lost_rank.py: replicated experts, and one rank that is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from survivors import describe, join

import moecomm
from moecomm.balance import Placement, rebalance

SIZE, EXPERTS, TOP_K, HIDDEN, TOKENS, TIMEOUT = 4, 8, 3, 16, 12, 8.0
# Only rank 1 has experts 3 and 4, and only rank 3 has 7. The other experts have replicas elsewhere.
TABLE = [[0, 1, 2, 3, 4, 0, 5, 6, 1, 7, 2, 5]] * 2  # two layers; steps use the first, migrations move both


class Mortal(list):
    """A rank's weights. Once the first layer has moved, reading the second one kills the process."""

    def __getitem__(self, layer):
        if layer == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(layer)


def batch(rank, step):
    """Return (x, ids, shares) with whole numbers, so that sums are exact in any order."""
    g = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randint(-3, 4, (TOKENS, HIDDEN), generator=g).float()
    ids = torch.rand((TOKENS, EXPERTS), generator=g).argsort(-1)[:, :TOP_K].contiguous()
    return x, ids, torch.randint(1, 5, (TOKENS, TOP_K), generator=g).float()


class Serving:
    """Steps of one rank. Every result is compared with the sum over the remaining experts."""

    def __init__(self, comm, placement, local, mode, original_rank):
        self.scale = torch.randint(
            -4, 5, (EXPERTS, HIDDEN), generator=torch.Generator().manual_seed(1)
        ).float()
        self.local = (
            [self.scale[table.view(comm.size, -1)[comm.rank]] for table in placement.physical_to_logical]
            if local is None
            else local
        )
        self.buf = moecomm.Buffer(
            comm,
            hidden=HIDDEN,
            num_experts=EXPERTS,
            top_k=TOP_K,
            max_tokens=TOKENS,
            dtype=torch.float32,
            placement=placement,
            replicas=mode,
        )
        self.here, self.rank = placement.replica_count[0] > 0, original_rank

    def step(self, number):
        """Run one batch; return the lost weight."""
        x, ids, shares = batch(self.rank, number)
        out = self.buf.dispatch(x, ids, shares)
        y = self.buf.combine(
            out.x * torch.repeat_interleave(self.local[0], out.tokens_per_expert, 0),
            out.handle,
            topk_weights=out.topk_weights,
        )
        kept = shares * self.here[ids]
        assert torch.equal(y + 0.0, (x[:, None] * self.scale[ids] * kept[..., None]).sum(1) + 0.0), (
            f"step {number}"
        )
        assert torch.equal(out.lost_weight, (shares - kept).sum(1)), f"step {number}"
        return float(out.lost_weight.sum())


def main(folder, rank, ranks_per_node, victim, mode, moment):
    """Serve until the victim is killed, then continue with the survivors. Writes FOLDER/RANK.json."""
    folder, seen = Path(folder), {}
    comm = moecomm.Communicator(
        join(folder, "first", rank, SIZE), ranks_per_node=ranks_per_node, timeout=TIMEOUT
    )
    placement = Placement(torch.tensor(TABLE), EXPERTS, SIZE, SIZE // ranks_per_node)
    serving = Serving(comm, placement, None, mode, rank)
    assert sum(serving.step(n) for n in range(3)) == 0
    comm.barrier()
    began, number = time.monotonic(), 3
    try:
        if moment == "while migrating":
            target = rebalance(
                torch.tensor([[1.0, 9, 1, 1, 9, 1, 1, 1]] * 2),
                num_replicas=12,
                num_nodes=placement.num_nodes,
                num_ranks=SIZE,
                previous=placement,
            )
            assert set(target.moves[:, 0].tolist()) == {0, 1}
            before = [w.clone() for w in serving.local]
            weights = Mortal(serving.local) if rank == victim else serving.local
            try:
                pending = target.migrate(weights, comm)
                pending.wait()
            finally:
                assert pending.layers_done <= 1, (
                    "no rank takes a migration for complete that another one has not ended"
                )
                assert all(map(torch.equal, serving.local, before)), "the old weights are only read"
                assert serving.buf.backend.router.placement is placement
        elif rank == victim and moment == "between steps":
            os.kill(os.getpid(), signal.SIGKILL)
        elif rank == victim:
            serving.buf.backend.memory.native.set_fault(point="copy", action="kill", passes=5)
        while True:
            serving.step(number)
            number += 1
    except moecomm.MoecommError as error:
        seen["error"], seen["seconds"] = describe(error), time.monotonic() - began
        alive = [r for r in range(SIZE) if r != error.peer]
    left = comm.shrink(alive)
    serving = Serving(left, placement.surviving(alive, num_nodes=left.num_nodes), serving.local, mode, rank)
    seen["lost"] = [serving.step(3)]  # repeat the failed batch
    seen["recovered"] = time.monotonic() - began
    seen["lost"] += [serving.step(n) for n in range(4, 7)]
    left.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    serving.buf.close()
    left.close()
    comm.close()
