"""A program for launchers: finds the world in the environment, runs cases against the oracle, then a subgroup.

torchrun --nproc-per-node 4 tests/support/launched.py
"""

import os

import torch.distributed as dist
from cases import Case, check_case

import moecomm

if "TORCHELASTIC_RUN_ID" in os.environ:
    dist.init_process_group("gloo")
with moecomm.Communicator(ranks_per_node=2, timeout=20) as comm:
    for layout in ("expert", "rank"):
        check_case(comm, Case(ranks_per_node=2, tokens=[3, 0, 7, 5], layout=layout, reuse=1))
    if dist.is_initialized():  # a ProcessGroup of some of the ranks
        for ranks in ([0, 2], [1, 3]):
            group = dist.new_group(ranks)
            if comm.rank in ranks:
                with moecomm.Communicator(group, ranks_per_node=1, timeout=20) as part:
                    assert (part.rank, part.size) == (ranks.index(comm.rank), 2)
                    check_case(part, Case(ranks_per_node=1, tokens=[4, 6]))
    comm.barrier()
    print(f"rank {comm.rank} of {comm.size} is done")
if dist.is_initialized():
    dist.destroy_process_group()
