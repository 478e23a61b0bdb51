"""Groups of several warps whose lanes run in any order: all lanes of a group make the same decisions."""

import pytest
import torch
from emulated_gpu import install
from worlds import assert_same, random_world, round_trip

import moecomm
from moecomm import reference, tuning

HIDDEN, TOKENS = 64, 2


def wide(hardware, traffic):
    """Choose two blocks of four warps: with two tokens they are two squads."""
    return tuning.replace(tuning.choose_plan(hardware, traffic, 2), num_sms=2, warps=4, channels=2, senders=0)


@pytest.fixture
def gpu(monkeypatch):
    return install(monkeypatch, wide)


def run(main, size, per_node):
    """Run main(comm) on rank threads of one GPU."""
    return moecomm.run_local(main, size, ranks_per_node=per_node, device="cuda:0", timeout=20.0)


def test_a_squad_that_starts_while_another_one_fails(gpu):
    """The token of the first squad has an invalid id: all lanes of the second squad agree on whether they see it."""

    def main(comm):
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=2, top_k=1, max_tokens=TOKENS, num_sms=2, decode=True
        )
        x, ids = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.tensor([[0], [1]])
        for seed in range(20):
            with (
                gpu.any_order(seed),
                pytest.raises(moecomm.InvalidArgument, match="expert id 7 is out of range in token 0"),
            ):
                buf.decode_dispatch(x, torch.tensor([[7], [1]]), quant=None, return_hook=False)
                comm.synchronize()
        recv, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
        assert_same(recv.x[:, 0], x, "afterwards")

    run(main, 1, 1)


@pytest.mark.parametrize("size,per_node", [(2, 2), (2, 1)])
def test_any_order_gives_the_same_bits(gpu, size, per_node):
    """Decode, dispatch and combine under random orders of blocks, warps and lanes."""
    world = random_world(size, TOKENS, HIDDEN, 2 * size, 2, seed=size + per_node)
    xs, ids, weights = world
    want = reference.decode_dispatch(xs, ids, num_experts=2 * size, max_tokens=TOKENS)
    sums = reference.decode_combine(
        [w.x for w in want], ids, weights, num_experts=2 * size, ranks_per_node=per_node
    )

    def main(comm):
        buf, r = (
            moecomm.Buffer(
                comm, hidden=HIDDEN, num_experts=2 * size, top_k=2, max_tokens=TOKENS, num_sms=2, decode=True
            ),
            comm.rank,
        )
        for _ in range(5):
            recv, _ = buf.decode_dispatch(xs[r], ids[r], quant=None, return_hook=False)
            y, _ = buf.decode_combine(
                recv.handle.rows.copy_(recv.x), ids[r], weights[r], recv.handle, return_hook=False
            )
            assert_same(y, sums[r], f"rank {r}: y")
        round_trip(comm, world, num_experts=2 * size, top_k=2)

    with gpu.any_order(size):
        run(main, size, per_node)
