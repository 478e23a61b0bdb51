"""Buffer.mask: decode goes on without ranks that have ended, in the same memory. Rank threads, in both worlds.

Ranks that are killed: tests/elastic/test_mask.py. CUDA graphs: tests/cuda/test_cuda_masked.py.
"""

import ctypes
import time

import pytest
import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture
from masked import check, oracle, step
from worlds import random_world

import moecomm

HIDDEN, TOKENS, K, TIMEOUT = 64, 6, 3, 2.0
LOST = (moecomm.PeerLost, moecomm.PeerTimeout)


def make(comm, **more):
    """Make a buffer with two experts per rank."""
    return moecomm.Buffer(
        comm,
        hidden=HIDDEN,
        num_experts=2 * comm.size,
        top_k=min(K, 2 * comm.size),
        max_tokens=TOKENS,
        num_sms=2,
        **more,
    )


def run(main, nodes, per_node):
    """Run main(comm) on rank threads."""
    return moecomm.run_local(main, nodes * per_node, ranks_per_node=per_node, timeout=TIMEOUT)


def steps(buf, masked, seeds, travel=False):
    """Make steps with the traffic of these seeds, and compare each with the oracle."""
    comm = buf.comm
    for seed in seeds:
        xs, ids, weights = random_world(comm.size, TOKENS, HIDDEN, 2 * comm.size, K, seed=seed)
        mine = xs[comm.rank], ids[comm.rank], weights[comm.rank]
        want = oracle(masked, xs, ids, weights, 2 * comm.size, TOKENS, comm.ranks_per_node, travel)
        check(comm.rank, *step(buf, *mine, travel), *want, f"step {seed}")


def fail(buf, seed):
    """Make steps until one fails since a rank is missing."""
    xs, ids, weights = random_world(buf.comm.size, TOKENS, HIDDEN, 2 * buf.comm.size, K, seed=seed)
    with pytest.raises(LOST):
        for _ in range(3):
            step(buf, xs[buf.comm.rank], ids[buf.comm.rank], weights[buf.comm.rank])


@pytest.mark.parametrize("nodes,per_node,travel", [(1, 3, False), (3, 1, True), (2, 2, False)])
def test_the_others_go_on_where_two_ranks_end_one_after_another(either_world, nodes, per_node, travel):  # noqa: F811
    victims = [nodes * per_node - 1, 0]

    def main(comm):
        buf, masked = make(comm), []
        steps(buf, masked, range(3), travel)
        for victim in victims:
            if comm.rank == victim:
                return
            fail(buf, 90)
            buf.mask([victim])
            masked = sorted([*masked, victim])
            assert buf.masked == tuple(masked)
            ids = torch.arange(2 * comm.size).repeat(2, 1)[:, : buf.top_k].contiguous()
            weights = torch.rand(ids.shape)
            gone = torch.isin(ids // 2, torch.tensor(masked))
            torch.testing.assert_close(buf.decode_lost_weight(ids, weights), (weights * gone).sum(1))
            steps(buf, masked, range(10 + victim, 14 + victim), travel)

    run(main, nodes, per_node)


def test_a_rank_ends_between_its_dispatch_and_its_combine(either_world):  # noqa: F811
    def main(comm):
        buf = make(comm)
        steps(buf, (), range(1))
        xs, ids, weights = random_world(3, TOKENS, HIDDEN, 6, K, seed=7, masked=0.0)
        r = comm.rank
        recv, hook = buf.decode_dispatch(xs[r], ids[r], quant=None)
        if r == 1:
            return
        if r == 0:
            time.sleep(TIMEOUT / 2 if comm.gpu is None else 2 * TIMEOUT)  # rank 2 is late only then
        if r == 2:  # a phase ahead of rank 0
            hook()
            recv.handle.rows.copy_(recv.x)
            with pytest.raises(LOST):
                buf.decode_combine(recv.handle.rows, ids[r], weights[r], recv.handle, return_hook=False)
                buf.decode_dispatch(xs[r], ids[r], quant=None, return_hook=False)
        buf.mask([1])
        with pytest.raises(LOST):
            hook()
        with pytest.raises(moecomm.InvalidArgument, match="handle is too old"):
            buf.decode_combine(recv.handle.rows, ids[r], weights[r], recv.handle, return_hook=False)
        steps(buf, (1,), range(20, 25))
        with pytest.raises(LOST):
            hook()

    run(main, 1, 3)


def test_what_else_the_communicator_did_has_ended(either_world):  # noqa: F811
    def main(comm):
        buf = make(comm)
        steps(buf, (), range(2))
        if comm.rank == 0:
            return
        fail(buf, 90)
        buf.mask([0])
        with pytest.raises(LOST):
            buf.dispatch(torch.ones((1, HIDDEN)).bfloat16(), torch.tensor([[0, 1, 2]]))
        steps(buf, (0,), range(5, 8))

    run(main, 1, 3)


def test_a_refused_step_behind_a_mask_keeps_the_ranks_in_step():
    def main(comm):
        buf = make(comm)
        steps(buf, (), range(1))
        if comm.rank == 2:
            return
        fail(buf, 90)
        buf.mask([2])
        x, ids = torch.ones((TOKENS, HIDDEN)).bfloat16(), torch.tensor([[0, 1, 2]] * TOKENS)
        with pytest.raises(moecomm.InvalidArgument):
            buf.decode_dispatch(x[:, :8] if comm.rank == 0 else x, ids, quant=None, return_hook=False)
        steps(buf, (2,), range(5, 8))

    run(main, 1, 3)


def test_a_rank_that_may_live_is_not_masked(either_world):  # noqa: F811
    def main(comm):
        buf = make(comm)
        steps(buf, (), range(2))
        if comm.rank != 1:
            with pytest.raises(moecomm.InvalidArgument, match="no rank knows that rank 1 is dead") as raised:
                buf.mask([1])
            assert raised.value.peer == 1 and buf.masked == ()
        comm.barrier()
        steps(buf, (), range(2, 5))

    run(main, 1, 3)


@pytest.mark.parametrize("ranks", [[], [0], [3], ["1"], None, 1])
def test_wrong_ranks_are_refused(either_world, ranks):  # noqa: F811
    def main(comm):
        buf = make(comm, decode=True)
        with pytest.raises(moecomm.InvalidArgument, match=r"expected other ranks than 0 of 0\.\.1"):
            if comm.rank == 0:
                buf.mask(ranks)
            else:
                raise moecomm.InvalidArgument("expected other ranks than 0 of 0..1")
        comm.barrier()

    run(main, 1, 2)


def test_what_cannot_be_masked_is_refused(either_world, tmp_path):  # noqa: F811
    from moecomm.balance import rebalance

    def main(comm):
        placement = rebalance(torch.ones(1, 2), num_replicas=2, num_nodes=1, num_ranks=1)
        for buf, why in (
            (make(comm), "there was no decode_dispatch"),
            (make(comm, decode=True, placement=placement), "has a placement"),
            (make(comm, decode=True, record=tmp_path), "has record="),
        ):
            with pytest.raises(moecomm.InvalidArgument, match=why):
                buf.mask([0])
            buf.close()

    run(main, 1, 1)


def test_nothing_is_written_into_the_memory_of_a_masked_rank(either_world):  # noqa: F811
    there = []

    def main(comm):
        buf = make(comm)
        steps(buf, (), range(2))
        if comm.rank == 1:
            there.append(buf.backend.memory.decode.native.window())
            return
        fail(buf, 90)
        buf.mask([1])
        before = ctypes.string_at(*there[0])
        steps(buf, (1,), range(5, 9))
        if comm.rank == 2:
            time.sleep(TIMEOUT / 2)  # the others wait for so long that they announce in which call they wait
        steps(buf, (1,), range(9, 10))
        if comm.rank == 3:
            return
        fail(buf, 91)  # reports that rank 3 is missing
        unchanged = ctypes.string_at(*there[0]) == before
        assert unchanged

    run(main, 2, 2)
