"""The program of one rank process of test_failures.py."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
from cases import Case, check_case

import moecomm

TOKENS, HIDDEN, TIMEOUT = 24, 64, 6.0


def join(folder, name, rank, size):
    """Make a gloo group over a file on the host."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{name}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=20),
    )
    return torch.distributed.group.WORLD


def cpu_seconds():
    """CPU time of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def describe(error):
    """Return the fields of an error for the parent."""
    return {
        "type": type(error).__name__,
        "text": str(error),
        **{
            name: getattr(error, name)
            for name in ("op", "phase", "rank", "peer", "expected", "got", "reporter")
        },
    }


def main(folder, rank, size, ranks_per_node, victim, fault, environment):
    """Run until the victim fails, write the observations, then continue without it. Writes FOLDER/RANK.json."""
    os.environ.update(environment)
    folder = Path(folder)
    seen = {}
    comm = moecomm.Communicator(
        join(folder, "first", rank, size), ranks_per_node=ranks_per_node, timeout=TIMEOUT
    )
    buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=4 * size, top_k=4, max_tokens=TOKENS, channels=2)
    torch.manual_seed(rank)
    x, ids = (
        torch.randn(TOKENS, HIDDEN).bfloat16(),
        torch.rand(TOKENS, 4 * size).argsort(1)[:, :4].contiguous(),
    )

    def round_trip():
        out = buf.dispatch(x, ids)
        buf.combine(out.x, out.handle)

    round_trip()
    comm.barrier()
    began = time.monotonic()
    if rank == victim:
        (folder / "armed").touch()
        if fault["point"] == "before":
            os.kill(os.getpid(), signal.SIGKILL if fault["action"] == "kill" else signal.SIGSTOP)
        elif fault["point"] != "random":
            buf.backend.memory.native.set_fault(**fault)
    try:
        while True:
            round_trip()
            if fault["point"] != "random":
                assert rank != victim, "the fault did not strike"
    except moecomm.MoecommError as error:
        seen["error"] = describe(error)
        seen["seconds"] = time.monotonic() - began
    began = time.monotonic()
    try:
        buf.dispatch(x, ids)  # the communicator is broken: it raises at once
    except moecomm.MoecommError as error:
        seen["again"] = describe(error)
        seen["again_seconds"] = time.monotonic() - began
    spent = cpu_seconds()
    time.sleep(0.5)
    seen["idle_cpu"] = cpu_seconds() - spent
    began = time.monotonic()
    buf.close()
    comm.close()
    seen["close_seconds"] = time.monotonic() - began
    torch.distributed.destroy_process_group()
    spent = cpu_seconds()
    time.sleep(0.3)
    seen["closed_cpu"] = cpu_seconds() - spent

    survivors = [r for r in range(size) if r != victim]
    with moecomm.Communicator(
        join(folder, "second", survivors.index(rank), len(survivors)), ranks_per_node=1, timeout=15
    ) as comm:
        check_case(comm, Case(ranks_per_node=1, tokens=[5] * comm.size))
    seen["second world"] = True
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()
