"""For torchrun on machines with GPUs: dispatch and combine between processes, against the oracle.

torchrun --nproc-per-node 4 tests/support/cuda_worker.py [ranks per node]
"""

import os
import sys

import torch
from worlds import assert_same, random_world

import moecomm
from moecomm import reference

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
with moecomm.Communicator(
    device="cuda", ranks_per_node=int(sys.argv[1]) if len(sys.argv) > 1 else 2, timeout=30
) as comm:
    xs, ids, weights = random_world(
        comm.size, [9, 0, 17, 5] * (comm.size // 4), 512, 4 * comm.size, 4, seed=3
    )
    for layout in ("expert", "rank"):
        want = reference.dispatch(xs, ids, weights, num_experts=4 * comm.size, layout=layout)
        expected = reference.combine(
            [w.x for w in want], want, [len(x) for x in xs], ranks_per_node=comm.ranks_per_node
        )
        buf = moecomm.Buffer(comm, hidden=512, num_experts=4 * comm.size, top_k=4, max_tokens=17, num_sms=2)
        for _ in range(3):
            out = buf.dispatch(*(t[comm.rank].to(comm.device) for t in (xs, ids, weights)), layout=layout)
            assert_same(out.x.cpu(), want[comm.rank].x, f"rank {comm.rank}: x, {layout}")
            out.handle.rows.copy_(out.x)
            assert_same(
                buf.combine(out.handle.rows, out.handle).cpu(),
                expected[comm.rank],
                f"rank {comm.rank}: y, {layout}",
            )
        torch.cuda.synchronize()
        comm.barrier()
        buf.close()
    print(f"rank {comm.rank} over {os.environ.get('MOECOMM_CUDA_FABRIC', 'auto')} is done; rail: {comm.rail}")
