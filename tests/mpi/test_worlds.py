"""The cases of the rank-thread suites on processes: shared memory inside a node, UCX between nodes."""

import random
import time
from dataclasses import replace

import pytest
import torch
from cases import Case, check_case, make_case

import moecomm

pytestmark = pytest.mark.mpi(min_size=2)
TIMEOUT = 20.0


def node_sizes(size):
    """Return all ways to split the world into nodes of equal size."""
    return [p for p in range(1, size + 1) if size % p == 0]


def test_edges(world):
    size = world.size
    tokens = [(5 * r + 3) % 11 * (r != 1) for r in range(size)]  # rank 1 has no tokens
    for per_node in node_sizes(size):
        base = Case(ranks_per_node=per_node, tokens=tokens)
        with moecomm.Communicator(world, ranks_per_node=per_node, timeout=TIMEOUT) as comm:
            for case in (
                base,
                replace(base, layout="rank", channels=3),
                replace(base, routing="one_expert", alignment=8, reuse=1),
                replace(base, routing="masked", capacity="spare"),
                replace(base, quantized=True, hidden=144, layout="rank", reuse=1),
                replace(
                    base,
                    async_op=True,
                    in_place=False,
                    bias="matrix",
                    combine_weights="other",
                    capacity="exact",
                ),
                replace(base, tokens=[0] * size),
                replace(base, dtype=torch.float64, bias="row"),
                replace(base, quant="fp8", scale_layout="column", hidden=400, wire="logfmt10", channels=3),
                replace(base, quant="fp8_ue8m0", hidden=144, wire="fp8", reuse=1, capacity="spare"),
                replace(base, tokens=[40] * size, hidden=2048),
            ):
                check_case(comm, case)


@pytest.mark.parametrize("seed", range(8))
def test_random_worlds(world, seed):
    choice = random.Random(1000 * world.size + seed).choice
    per_node = choice(node_sizes(world.size))
    with moecomm.Communicator(world, ranks_per_node=per_node, timeout=TIMEOUT) as comm:
        check_case(comm, make_case(choice, world.size, per_node))


def test_the_rail_is_taken_between_nodes(world):
    if world.size % 2:
        pytest.skip(f"{world.size} ranks do not make nodes of 2")
    half = world.size // 2
    with moecomm.Communicator(world, ranks_per_node=half, timeout=TIMEOUT) as comm:
        assert comm.rail == "ucx" and (comm.num_nodes, comm.ranks_per_node) == (2, half)
        assert (comm.node, comm.local_rank) == divmod(world.rank, half)
        buf = moecomm.Buffer(comm, hidden=64, num_experts=world.size, top_k=1, max_tokens=4)
        other = (world.rank + half) % world.size
        out = buf.dispatch(torch.full((4, 64), float(world.rank)).bfloat16(), torch.full((4, 1), other))
        assert buf.stats()["rail"] == {
            "logical_rows": 4,
            "physical_rows": 4,
            "logical_bytes": 512,
            "physical_bytes": 512,
        }
        assert torch.equal(out.x, torch.full((4, 64), float(other)).bfloat16())
        comm.barrier()


def test_communicators_and_buffers_come_and_go(world):
    """Communicators and buffers are made and closed without leaks; several exist at a time."""
    for _ in range(3):
        with (
            moecomm.Communicator(world, ranks_per_node=1, timeout=TIMEOUT) as a,
            moecomm.Communicator(world, timeout=TIMEOUT) as b,
        ):
            for comm in (a, b, a):
                check_case(comm, Case(ranks_per_node=comm.ranks_per_node, tokens=[3] * world.size), rounds=1)


def test_a_part_of_the_world(world):
    """An mpi4py communicator of some of the ranks, in another order."""
    part = world.Split(world.rank % 2, -world.rank)
    with moecomm.Communicator(part, ranks_per_node=1, timeout=TIMEOUT) as comm:
        assert (comm.rank, comm.size) == (part.rank, part.size)
        check_case(comm, Case(ranks_per_node=1, tokens=[4] * part.size))
    world.Barrier()
    part.Free()


def test_closing_waits_for_what_is_under_way(world):
    """Rank 0 closes while its asynchronous dispatch still waits for the others."""
    with moecomm.Communicator(world, timeout=TIMEOUT) as comm:
        buf = moecomm.Buffer(comm, hidden=64, num_experts=world.size, top_k=1, max_tokens=4)
        x, ids = torch.ones(4, 64).bfloat16(), torch.full((4, 1), world.size - 1)
        if comm.rank:
            time.sleep(0.3)
        pending = buf.dispatch(x, ids, async_op=True)
        buf.close()
        assert len(pending.wait().x) == (4 * world.size if comm.rank == world.size - 1 else 0)
        comm.barrier()


@pytest.mark.parametrize("what", ["buffer", "communicator"])
def test_backward_after_close_says_so(world, what):
    comm = moecomm.Communicator(world, timeout=TIMEOUT)
    buf = moecomm.Buffer(comm, hidden=64, num_experts=world.size, top_k=1, max_tokens=4)
    out = buf.dispatch(torch.ones(4, 64).bfloat16().requires_grad_(), torch.full((4, 1), comm.rank))
    world.Barrier()
    (buf if what == "buffer" else comm).close()
    with pytest.raises(moecomm.InvalidArgument, match=f"combine.*: the {what} is closed"):
        out.x.float().sum().backward()
    comm.close()
