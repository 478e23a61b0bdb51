"""Calls of buffers whose memory grows, compared with the oracle."""

import os
from pathlib import Path

import torch
import worlds
from joining import group

import moecomm
from moecomm import reference

HIDDEN, EXPERTS, TOP_K = 64, 8, 3


def step(buf, comm, counts, seed, **how):
    """Run one dispatch and combine of counts[rank] tokens, compared with the oracle; return (y, out)."""
    xs, ids, weights = worlds.random_world(comm.size, counts, HIDDEN, EXPERTS, TOP_K, torch.float32, seed)
    r = comm.rank
    device = comm.device
    out = buf.dispatch(xs[r].to(device), ids[r].to(device), weights[r].to(device), **how)
    want = reference.dispatch(xs, ids, weights, num_experts=EXPERTS, layout=how.get("layout", "expert"))[r]
    assert torch.equal(out.x.cpu(), want.x) and torch.equal(out.topk_weights.cpu(), want.topk_weights)
    y = buf.combine(out.x.clone(), out.handle)
    assert torch.allclose(y.cpu(), xs[r] * rows_of(ids[r], comm.size, how.get("layout"))[:, None], atol=1e-4)
    return y, out


def rows_of(ids, size, layout):
    """Number of rows of a token: one per pick, or one per destination rank."""
    if layout != "rank":
        return (ids >= 0).sum(1)
    return torch.stack([(ids // (EXPERTS // size) == r).any(1) for r in range(size)]).sum(0)


def over_processes(folder, rank, size, per_node):
    """Run one rank of a world of processes. Windows are mapped again; handles keep the earlier windows."""
    with moecomm.Communicator(
        group(folder, "store", rank, size), ranks_per_node=per_node, timeout=60
    ) as comm:
        buf = moecomm.Buffer(comm, num_experts=EXPERTS)
        held = []
        for seed, most in enumerate((3, 17, 100, 60, 300)):
            counts = [most if r == seed % size else r for r in range(size)]
            held.append(step(buf, comm, counts, seed)[1])
        assert buf.max_tokens == 512
        kept = [out.x.clone() for out in held]
        for out, x in zip(held, kept, strict=True):
            y = buf.combine(x.clone(), out.handle)
            assert torch.equal(out.x, x)
            again = buf.dispatch(y, handle=out.handle)
            assert torch.equal(again.source_token, out.source_token)
        held += [step(buf, comm, [300] * size, seed)[1] for seed in range(8)]  # all results are kept
        buf.close()
        comm.barrier()
    (Path(folder) / f"{rank}.json").write_text("true")
    os._exit(0)
