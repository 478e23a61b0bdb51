"""The decode path on processes: shared memory inside a node, UCX to all ranks of the other nodes."""

import pytest
import torch
from decode_steps import check_dispatch, check_step, make_buffer
from worlds import random_world

import moecomm

pytestmark = pytest.mark.mpi(min_size=2)


def test_decode(world):
    size = world.size
    worlds = [
        random_world(size, [(3 + 5 * r + i) % 9 for r in range(size)], 144, 4 * size, 4, seed=i)
        for i in range(6)
    ]
    for per_node in [p for p in range(1, size + 1) if size % p == 0]:
        with moecomm.Communicator(world, ranks_per_node=per_node, timeout=20) as comm:
            buf = make_buffer(comm, worlds[0])
            for i, each in enumerate(worlds):
                check_step(
                    comm,
                    buf,
                    each,
                    weights_travel=i % 2 == 1,
                    in_place=i % 3 != 0,
                    return_hook=i != 4,
                    wire=(None, "fp8", "logfmt10")[i % 3],
                )
                check_dispatch(comm, buf, each, scheme=("fp8", "fp8_ue8m0")[i % 2])
            far = buf.stats()["decode"]["rail"]["physical_rows"]
            assert (far > 0) == (per_node < size)
            comm.barrier()
            buf.close()


def test_many_steps_keep_apart(world):
    """A thousand steps without a pause; every row contains its step and source."""
    per_node = world.size // 2 if world.size % 2 == 0 else 1
    with moecomm.Communicator(world, ranks_per_node=per_node, timeout=20) as comm:
        buf = moecomm.Buffer(
            comm, hidden=8, num_experts=comm.size, top_k=1, max_tokens=1, arena_bytes=1 << 16
        )
        x = torch.zeros(1, 8).bfloat16()
        words = x.view(torch.int64)
        for step in range(1000):
            words[:] = torch.tensor([step, comm.rank])
            to = (comm.rank + step) % comm.size
            recv, hook = buf.decode_dispatch(x, torch.tensor([[to]]), quant=None)
            hook()
            assert recv.counts.tolist() == [1] and recv.x[0, 0].view(torch.int64).tolist() == [
                step,
                (comm.rank - step) % comm.size,
            ]
            if step % 3:
                recv.handle.rows[0, 0] = recv.x[0, 0]
                y, _ = buf.decode_combine(
                    recv.handle.rows, torch.tensor([[to]]), None, recv.handle, return_hook=False
                )
                assert torch.equal(y.view(torch.int16)[:, 4:5], x.view(torch.int16)[:, 4:5])
        comm.barrier()
