"""MOECOMM_CHECK=1 in the cuda world, on an emulated GPU: all modes work, and corrupt rows are named."""

import random

import pytest
import torch
from cases import Case, check_case, make_case
from decode_steps import check_step
from emulated_gpu import emulated  # noqa: F401 - a fixture
from worlds import random_world

import moecomm

HIDDEN, TOKENS = 512, 5  # rows of 1024 bytes use the copy engine


@pytest.fixture(autouse=True)
def check_mode(monkeypatch):
    monkeypatch.setenv("MOECOMM_CHECK", "1")


def run(main, size, per_node):
    """Run main(comm) on rank threads of one GPU."""
    return moecomm.run_local(main, size, ranks_per_node=per_node, device="cuda:0", timeout=20.0)


@pytest.mark.parametrize("size,per_node", [(1, 1), (2, 2), (4, 2)])
def test_rows_are_signed_and_verified(emulated, size, per_node):  # noqa: F811
    """Rows in place and staged, with and without weights, both layouts, other wire formats."""

    def main(comm):
        for layout in ("expert", "rank"):
            for wire in (None, "fp8"):
                check_case(
                    comm,
                    Case(
                        ranks_per_node=per_node,
                        tokens=[TOKENS - r for r in range(size)],
                        layout=layout,
                        hidden=144,
                        wire=wire,
                        reuse=1,
                        bias="row",
                    ),
                )
        check_case(comm, make_case(random.Random(3).choice, size, per_node))

    run(main, size, per_node)


def test_decode_is_verified(emulated):  # noqa: F811
    """Two ways to send, and two ways to answer."""
    worlds = [random_world(2, [TOKENS, 2], 128, 8, 4, seed=i) for i in range(4)]

    def main(comm):
        buf = moecomm.Buffer(
            comm, hidden=128, num_experts=8, top_k=4, max_tokens=TOKENS, decode=True, num_sms=2
        )
        for i, world in enumerate(worlds):
            check_step(
                comm,
                buf,
                world,
                scheme="fp8" if i % 2 else None,
                wire="fp8" if i > 1 else None,
                in_place=i % 2 == 0,
                weights_travel=i > 1,
            )

    run(main, 2, 1)


def all_ranks_raise(main, size, per_node):
    """Run main(comm) on all ranks, then calls until all ranks raise; return the CorruptRow of each rank."""

    def one(comm):
        with pytest.raises(moecomm.CorruptRow) as raised:
            again = main(comm)
            for _ in range(3):
                again()
        return raised.value

    return run(one, size, per_node)


def assert_named(errors, *, source, destination, token, phase):
    for rank, e in enumerate(errors):
        assert (e.rank, e.peer, e.source, e.destination, e.token) == (
            rank,
            source,
            source,
            destination,
            token,
        ), f"{rank}: {e}"
    assert errors[destination].phase == phase and errors[destination].expected != errors[destination].got


def test_a_damaged_row_of_dispatch(emulated):  # noqa: F811
    """Rank 0 writes its rows to rank 1's window, and one of them is damaged."""

    def main(comm):
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=2 * comm.size, top_k=1, max_tokens=TOKENS, num_sms=2, channels=1
        )
        x, ids = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.full((TOKENS, 1), 2)
        tokens = TOKENS if comm.rank == 0 else 0
        if comm.rank == 0:
            emulated.damage(2 * pieces(buf))  # the third row
        buf.dispatch(x[:tokens], ids[:tokens], capacity=2 * TOKENS)
        return lambda: buf.dispatch(x[:tokens], ids[:tokens], capacity=2 * TOKENS)

    assert_named(all_ranks_raise(main, 2, 2), source=0, destination=1, token=2, phase="arrive")


def pieces(buf):
    """Number of bulk stores per row."""
    return -(-buf.hidden * buf.dtype.itemsize // buf.backend.memory.plan.stage_bytes)


def test_a_damaged_sum_of_combine(emulated):  # noqa: F811
    """Rank 1 sums rows for rank 0's tokens and sends the sums over the rail; one of them is damaged."""

    def main(comm):
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=2 * comm.size, top_k=1, max_tokens=TOKENS, num_sms=2, channels=1
        )
        x, ids = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.full((TOKENS, 1), 2)
        tokens = TOKENS if comm.rank == 0 else 0
        out = buf.dispatch(x[:tokens], ids[:tokens])
        if comm.rank == 1:
            emulated.damage(0)
        buf.combine(out.x, out.handle)
        return lambda: buf.dispatch(x[:tokens], ids[:tokens])

    assert_named(all_ranks_raise(main, 2, 1), source=1, destination=0, token=0, phase="sum")


def test_a_damaged_row_of_decode(emulated):  # noqa: F811
    """Rank 1 packs the rows of rank 0; one row is damaged."""

    def main(comm):
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=2 * comm.size, top_k=1, max_tokens=TOKENS, num_sms=2, decode=True
        )
        x, ids = torch.randn(1, HIDDEN).bfloat16(), torch.full((1, 1), 2)
        tokens = 1 if comm.rank == 0 else 0

        def step():
            recv, _ = buf.decode_dispatch(x[:tokens], ids[:tokens], quant=None, return_hook=False)
            buf.decode_combine(recv.handle.rows, ids[:tokens], None, recv.handle, return_hook=False)

        if comm.rank == 1:
            emulated.damage(0)
        step()
        return step

    assert_named(all_ranks_raise(main, 2, 2), source=0, destination=1, token=0, phase="arrive")
