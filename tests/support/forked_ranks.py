"""Ranks that are forked from a process which has imported everything, because importing clients takes longest."""

import os
import sys
import traceback
from datetime import timedelta

import torch.distributed as dist

import moecomm


def one_rank(run, rank, size, folder):
    """A forked rank: joins the others, runs the client, writes its largest difference."""
    moecomm.bootstrap.make_default_group(
        init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    worst = run(rank, size)
    dist.barrier()
    with open(f"{folder}/{rank}", "w") as f:
        f.write(repr(worst))


def over_ranks(run, size, folder):
    """The largest difference that run(rank, size) returns on any rank; None where one failed.

    A rank that fails writes why to stderr.
    """
    os.mkdir(folder)
    ranks = []
    for rank in range(size):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            status = 1
            try:
                one_rank(run, rank, size, folder)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
    failed = [rank for rank, pid in enumerate(ranks) if os.waitpid(pid, 0)[1]]
    return None if failed else max(float(open(f"{folder}/{rank}").read()) for rank in range(size))
