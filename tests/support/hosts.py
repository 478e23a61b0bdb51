"""The program of one rank process of test_two_hosts.py, in a network namespace."""

from __future__ import annotations

import ctypes
import json
import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from cases import Case, check_case
from survivors import describe

import moecomm

CLONE_NEWNET, CLONE_NEWNS, MS_REC, MS_PRIVATE, MNT_DETACH = 0x40000000, 0x00020000, 0x4000, 1 << 18, 2


def enter(namespace):
    """Move this process into the network namespace, with a matching /sys."""
    libc = ctypes.CDLL(None, use_errno=True)

    def do(name, *arguments):
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), name)

    with open(f"/run/netns/{namespace}") as f:
        do("setns", f.fileno(), CLONE_NEWNET)
    do("unshare", CLONE_NEWNS)
    do("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    libc.umount2(b"/sys", MNT_DETACH)
    do("mount", b"sys", b"/sys", b"sysfs", 0, None)


def main(folder, namespace, rank, size, cut):
    """Run cases against the oracle; with `cut`, run calls until the link fails. Writes FOLDER/RANK.json."""
    enter(namespace)
    os.environ.update(UCX_TLS="tcp,self", UCX_NET_DEVICES="wire", GLOO_SOCKET_IFNAME="wire")
    folder, seen = Path(folder), {}
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=30),
    )
    comm = moecomm.Communicator(torch.distributed.group.WORLD, timeout=5.0 if cut else 20.0)
    seen["nodes"] = [comm.num_nodes, comm.ranks_per_node, comm.rail]
    base = Case(ranks_per_node=size // 2, tokens=[(3 * r + 2) % 10 for r in range(size)])
    for case in (
        [base]
        if cut
        else [
            base,
            replace(base, layout="rank", reuse=1),
            replace(base, quantized=True, hidden=144, alignment=4),
            replace(base, tokens=[48] * size, hidden=1024, channels=4, bias="row"),
        ]
    ):
        check_case(comm, case)
    if cut:
        buf = moecomm.Buffer(comm, hidden=64, num_experts=2 * size, top_k=2, max_tokens=8)
        x, ids = torch.randn(8, 64).bfloat16(), torch.rand(8, 2 * size).argsort(1)[:, :2].contiguous()
        buf.dispatch(x, ids)
        comm.barrier()
        if rank == 0:
            (folder / "armed").touch()
        began = time.monotonic()
        try:
            while True:
                buf.dispatch(x, ids)
                began = time.monotonic()
        except moecomm.MoecommError as error:
            seen["error"], seen["seconds"] = describe(error), time.monotonic() - began
        began = time.monotonic()
        buf.close()
        comm.close()
        seen["close_seconds"] = time.monotonic() - began
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    if cut:
        os._exit(0)  # gloo would wait for the failed link
    comm.barrier()
    comm.close()
