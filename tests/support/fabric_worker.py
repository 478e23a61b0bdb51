"""The program of one rank process of tests/fabric/test_fabric_processes.py."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from fabric_cases import check_program
from survivors import describe, join

import moecomm
from moecomm.fabric import Domain

TIMEOUT = 6.0


def world(folder, rank, size, per_node, environment, timeout=TIMEOUT):
    """Make a Communicator of these processes."""
    os.environ.update(environment)
    return moecomm.Communicator(join(folder, "group", rank, size), ranks_per_node=per_node, timeout=timeout)


def run_program(folder, rank, size, per_node, environment, seed, mapped):
    """Run a random program between processes."""
    with world(folder, rank, size, per_node, environment, 60.0) as comm:
        if mapped is not None:
            domain = Domain(comm, 4096)
            assert domain._native.rail_is_mapped() == mapped
        check_program(comm, seed, 20, long=501)
    torch.distributed.destroy_process_group()


def loop_of(domain, verb):
    """Return a function that runs one round of a verb on all ranks."""
    comm = domain.comm
    t, src = domain.tensor(50_000, torch.float32), torch.ones(50_000)
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    rounds = 0

    def ring():
        nonlocal rounds
        rounds += 1
        domain.write(right, t, src, counter=0)
        domain.wait(left, 0, rounds * src.numel() * 4)

    def multicast():
        domain.multicast(range(comm.size), t, src, root=3)  # rank 1 is the gateway of its node

    def reduce():
        domain.reduce(range(comm.size), src, t, root=3)

    return {"ring": ring, "multicast": multicast, "reduce": reduce}[verb]


def survive(folder, rank, size, per_node, environment, verb, victim, fault):
    """Run a verb until the victim fails; write the observations to FOLDER/RANK.json."""
    comm = world(folder, rank, size, per_node, environment)
    domain = Domain(comm, 1 << 20)
    once, seen = loop_of(domain, verb), {}
    once()
    comm.barrier()
    began = time.monotonic()
    if rank == victim:
        domain._native.set_fault(**fault)
    try:
        for _ in range(2000):
            once()
    except moecomm.MoecommError as error:
        seen["error"], seen["seconds"] = describe(error), time.monotonic() - began
    began = time.monotonic()
    try:
        domain.multicast([0], domain._memory[:4], torch.zeros(4, dtype=torch.uint8), root=0)
    except moecomm.MoecommError as error:
        seen["again"], seen["again_seconds"] = describe(error), time.monotonic() - began
    began = time.monotonic()
    domain.close()
    comm.close()
    seen["close_seconds"] = time.monotonic() - began
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()
