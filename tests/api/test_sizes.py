"""Size hints without ranks, and counts per source."""

import pytest
import torch
import worlds
from emulated_gpu import either_world  # noqa: F401 - a fixture

import moecomm

SHAPE = dict(hidden=256, num_experts=8, top_k=2, max_tokens=32)


@pytest.mark.parametrize("per_node", [2, 4])
def test_hints_without_ranks(per_node):
    """The hints equal those of a communicator and the sizes of Buffers."""
    alone = dict(size=4, ranks_per_node=per_node)
    hints = [moecomm.Buffer.size_hint(**SHAPE, **alone, **how) for how in ({}, {"decode": True})]
    arena = moecomm.Buffer.arena_hint(**SHAPE, size=4, dispatches=5)

    def main(comm):
        assert moecomm.Buffer.size_hint(comm, **SHAPE) == hints[0] == moecomm.Buffer(comm, **SHAPE).num_bytes
        assert moecomm.Buffer.size_hint(comm, **SHAPE, decode=True) == hints[1] > hints[0]
        assert moecomm.Buffer.arena_hint(comm, **SHAPE, dispatches=5) == arena
        with pytest.raises(moecomm.InvalidArgument, match="comm is given, and also size"):
            moecomm.Buffer.size_hint(comm, **SHAPE, size=4)

    moecomm.run_local(main, 4, ranks_per_node=per_node)


def test_refused():
    for message, how in (
        ("size is None; expected a number of ranks, or a Communicator", {}),
        ("size is 0", {"size": 0}),
        ("ranks_per_node is 3; expected a divisor of the 4 ranks", {"size": 4, "ranks_per_node": 3}),
        ("num_experts is 8; expected a multiple of the 3 ranks", {"size": 3}),
    ):
        with pytest.raises(moecomm.InvalidArgument, match=message):
            moecomm.Buffer.size_hint(**SHAPE, **how)


def test_counts_of_another_dtype(either_world):  # noqa: F811
    """int32 counts with and without padding, before and after wait(); other dtypes are refused."""
    xs, ids, weights = worlds.random_world(2, [9, 20], 256, 8, 2, torch.bfloat16, seed=5)
    want = moecomm.reference.dispatch(xs, ids, weights, num_experts=8, layout="expert", expert_alignment=8)

    def main(comm):
        buf = moecomm.Buffer(comm, **SHAPE)
        r = comm.rank
        pending = buf.dispatch(
            *(t[r].to(comm.device) for t in (xs, ids, weights)), expert_alignment=8, async_op=True
        )
        for out in (pending.wait_counts(), pending.wait()):
            for dtype in (torch.int32, torch.int64):
                true, padded = out.counts_as(dtype)
                worlds.assert_same(true.cpu(), want[r].tokens_per_expert.to(dtype), "tokens_per_expert")
                worlds.assert_same(padded.cpu(), want[r].rows_per_expert.to(dtype), "rows_per_expert")
        with pytest.raises(moecomm.InvalidArgument, match=r"dtype is torch\.float32; expected torch\.int32"):
            out.counts_as(torch.float32)

    moecomm.run_local(main, 2)


@pytest.mark.parametrize("how", [{}, {"layout": "rank"}, {"expert_alignment": 8}, {"capacity": 90}])
def test_rows_per_source(either_world, how):  # noqa: F811
    counts = [9, 0, 20, 1]
    xs, ids, weights = worlds.random_world(4, counts, 256, 8, 2, torch.bfloat16, seed=3)

    def main(comm):
        buf = moecomm.Buffer(comm, **SHAPE)
        r = comm.rank
        out = buf.dispatch(*(t[r].to(comm.device) for t in (xs, ids, weights)), **how)
        mine = [(i // 2 == r) & (i >= 0) for i in ids]
        want = [int(m.any(1).sum() if how.get("layout") else m.sum()) for m in mine]
        assert out.rows_per_source.tolist() == want and out.rows_per_source.dtype == torch.int64

    moecomm.run_local(main, 4)
