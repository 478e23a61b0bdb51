"""A Domain of the cuda world, over an emulated GPU: the cpu world's programs, and what is the GPU's alone."""

import random

import pytest
import torch
from emulated_gpu import emulated  # noqa: F401 - a fixture
from fabric_cases import check_program, summed
from worlds import assert_same

import moecomm
from moecomm import ConfigMismatch, InvalidArgument, PeerTimeout
from moecomm.fabric import Domain

WORLDS = [(1, 1), (3, 3), (4, 2), (3, 1), (6, 3)]


def run(main, size, per_node, timeout=120.0):
    return moecomm.run_local(main, size, ranks_per_node=per_node, device="cuda:0", timeout=timeout)


@pytest.mark.parametrize("size,per_node", WORLDS)
def test_random_programs_equal_the_oracle(emulated, size, per_node):  # noqa: F811
    seed = random.randrange(1 << 30)
    print("seed", seed)
    run(lambda comm: check_program(comm, seed, 20, long=5003), size, per_node)


def test_a_multicast_puts_one_copy_on_each_link(emulated):  # noqa: F811
    rows, hidden = 40, 2048  # more runs than channels

    def main(comm):
        domain = Domain(comm, 1 << 20)
        dst = domain.tensor((rows, hidden))
        src = torch.randn(rows, hidden).bfloat16() if comm.rank == 1 else None
        domain.stats()
        domain.multicast([0, 2, 3, 5], dst, src, root=1)
        return domain.stats()

    stats = run(main, 6, 3)
    size = rows * hidden * 2
    assert [[n // size for n in s["links"]] for s in stats] == [
        [0] * 6,
        [1, 0, 1, 1, 0, 0],  # rank 4, on the root's rail, is no receiver: 3 is fed
        [0] * 6,
        [0, 0, 0, 0, 0, 1],
        [0] * 6,
        [0] * 6,
    ]
    assert all(n % size == 0 for s in stats for n in s["links"])
    assert sum(s["rail"]["physical_bytes"] for s in stats) == size
    assert sum(s["rail"]["logical_bytes"] for s in stats) == 2 * size


def test_bits_are_those_of_any_order(emulated):  # noqa: F811
    """Blocks, warps and lanes run in an order of their own."""
    rows = [torch.randn(70_001).to(torch.float16) for _ in range(4)]

    def main(comm):
        domain = Domain(comm, 1 << 20)
        src = domain.tensor(70_001, torch.float16)
        src.copy_(rows[comm.rank])
        for root in range(4):
            out = torch.empty(70_001).to(torch.float16) if comm.rank == root else None
            domain.reduce([0, 1, 3], out, src, root=root)
            if out is not None:
                assert_same(out, summed(rows, [0, 1, 3], root, 2), f"at {root}")

    with emulated.any_order(random.randrange(1, 1 << 20)):
        run(main, 4, 2)


def test_asynchronous_requests(emulated):  # noqa: F811
    def main(comm):
        domain = Domain(comm, 1 << 16)
        box, out = domain.tensor((comm.size, 65), torch.float64), torch.zeros(65, dtype=torch.float64)
        right = (comm.rank + 1) % comm.size
        sent = torch.full((65,), 1.0 + comm.rank, dtype=torch.float64)
        domain.write(right, box[comm.rank], sent, counter=2, async_op=True).wait()
        domain.wait((comm.rank - 1) % comm.size, 2, sent.nbytes)
        comm.barrier()
        domain.read(right, out, box[comm.rank], async_op=True).wait()
        assert (out == sent).all()
        pending = domain.multicast([0, 1, 2], box[0], sent if comm.rank == 2 else None, root=2, async_op=True)
        pending.wait()
        assert (box[0] == 3).all()
        comm.synchronize()

    run(main, 3, 1)


def test_wrong_calls_are_refused_and_leave_ranks_in_step(emulated):  # noqa: F811
    def main(comm):
        domain = Domain(comm, 4096)
        a = domain.tensor((4, 4), torch.float32)
        with pytest.raises(ConfigMismatch, match="another root"):
            domain.multicast([0, 1], a, torch.zeros(4, 4), root=comm.rank)
        with pytest.raises(InvalidArgument):
            domain.multicast([0, 9 if comm.rank == 1 else 1], a, torch.zeros(4, 4), root=0)
        with pytest.raises(InvalidArgument, match="src"):
            domain.write(0, a, torch.zeros(4, 5))
        src = torch.arange(16.0).view(4, 4)
        domain.multicast(range(comm.size), a, src if comm.rank == 1 else None, root=1)
        assert (a == src).all()

    run(main, 4, 2)


def test_a_capture_is_refused(emulated):  # noqa: F811
    def main(comm):
        domain = Domain(comm, 4096)
        a = domain.tensor(4, torch.float32)
        with emulated.capture(), pytest.raises(InvalidArgument, match="captured"):
            domain.write(0, a, torch.ones(4))

    run(main, 1, 1)


@pytest.mark.parametrize("verb", ["wait", "multicast", "reduce"])
def test_a_rank_that_stays_away_is_named(emulated, verb):  # noqa: F811
    def main(comm):
        domain = Domain(comm, 4096)
        a = domain.tensor(4, torch.float32)
        if comm.rank == 1:
            return
        with pytest.raises(PeerTimeout) as raised:
            if verb == "wait":
                domain.wait(1, 0, 1)
            elif verb == "multicast":
                domain.multicast([0, 1], a, torch.ones(4) if comm.rank == 0 else None, root=0)
            else:
                domain.reduce([0, 1], torch.ones(4) if comm.rank == 0 else None, a, root=0)
        assert raised.value.peer == 1, (
            raised.value
        )  # also where a rank in between comes to its deadline first
        with pytest.raises(moecomm.MoecommError):
            domain.fence()

    run(main, 4, 2, timeout=2.0)
