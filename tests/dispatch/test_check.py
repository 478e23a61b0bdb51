"""MOECOMM_CHECK=1: a damaged or stale row is named on every rank."""

import random
import threading
import time

import pytest
import torch
from cases import Case, check_case, make_case

import moecomm

HIDDEN, TOKENS = 64, 5


@pytest.fixture(autouse=True)
def check_mode(monkeypatch):
    monkeypatch.setenv("MOECOMM_CHECK", "1")


def all_ranks_raise(main, size, ranks_per_node):
    """Run main(comm) on all ranks; return the CorruptRow of each rank.

    Ranks that already had all their rows get the error in their next call.
    """

    def one(comm):
        with pytest.raises(moecomm.CorruptRow) as raised:
            buf, x, ids = main(comm)
            buf.dispatch(x, ids)
        return raised.value

    return moecomm.run_local(one, size, ranks_per_node=ranks_per_node, timeout=10)


def assert_named(errors, *, source, destination, token, phase, op="dispatch"):
    for rank, e in enumerate(errors):
        assert (e.rank, e.peer, e.source, e.destination, e.token) == (
            rank,
            source,
            source,
            destination,
            token,
        ), f"{rank}: {e}"
        assert e.reporter == (None if rank == destination else destination)
        assert f"source rank {source}, token {token}, for rank {destination}" in str(e)
    assert (errors[destination].op, errors[destination].phase) == (op, phase)
    assert errors[destination].expected != errors[destination].got


def inputs(comm, to, top_k=1):
    """Make a buffer, and inputs in which every token of every rank picks the first expert of rank `to`."""
    buf = moecomm.Buffer(
        comm, hidden=HIDDEN, num_experts=4 * comm.size, top_k=top_k, max_tokens=TOKENS, channels=1
    )
    return buf, torch.randn(TOKENS, HIDDEN).bfloat16(), torch.full((TOKENS, 1), 4 * to)


@pytest.mark.parametrize("seed", range(6))
def test_sound_worlds_pass(seed):
    case = make_case(random.Random(seed).choice, 4, 2)
    moecomm.run_local(lambda comm: check_case(comm, case), 4, ranks_per_node=2)


QUANTS = [(None, "row"), ("fp8", "row"), ("fp8", "column"), ("fp8_ue8m0", "row"), ("fp8_ue8m0", "column")]


@pytest.mark.parametrize("wire", [None, "fp8", "logfmt10"])
@pytest.mark.parametrize("quant,scale_layout", QUANTS)
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_every_mode_passes(layout, quant, scale_layout, wire):
    case = Case(
        ranks_per_node=2,
        tokens=[3, 8, 0, 5],
        layout=layout,
        hidden=144,
        quant=quant,
        scale_layout=scale_layout,
        wire=wire,
        reuse=1,
        alignment=4 if layout == "expert" else 1,
        bias="row",
    )
    moecomm.run_local(lambda comm: check_case(comm, case), 4, ranks_per_node=2, timeout=10)


@pytest.mark.parametrize("quant,scale_layout", QUANTS)
@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("hop", ["node", "rail"])
def test_every_mode_names_a_wrong_row(hop, layout, quant, scale_layout):
    """Rank 0's fourth row is damaged on the way to rank 1 of its own node, or to the gateway of rank 3."""
    destination = 1 if hop == "node" else 3

    def main(comm):
        buf, x, ids = inputs(comm, to=destination)
        tokens = TOKENS if comm.rank == 0 else 0
        x, ids = x[:tokens], ids[:tokens]
        if comm.rank == 0:
            pieces = 2 if quant and scale_layout == "row" else 1  # a row, and its scales beside it
            buf.backend.memory.native.set_fault(
                *(("copy", "damage", 3 * pieces) if hop == "node" else ("put", "damage", 1))
            )
        buf.dispatch(x, ids, layout=layout, quant=quant, scale_layout=scale_layout)
        return buf, x, ids

    # The gateway of rank 0's rows for the other node is rank 2: five rows leave in one put, of which the
    # middle is damaged.
    expected = (
        dict(destination=1, token=3, phase="arrive")
        if hop == "node"
        else dict(destination=2, token=2, phase="forward")
    )
    assert_named(all_ranks_raise(main, 4, 2), source=0, **expected)


@pytest.mark.parametrize("wire", [None, "fp8", "logfmt10"])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_every_wire_names_a_wrong_row(layout, wire):
    """Rank 2 is the gateway of rank 0's rows: one of the sums that it sends over the rail is damaged."""

    def main(comm):
        buf, x, ids = inputs(comm, to=3)
        out = buf.dispatch(x, ids, layout=layout)
        if comm.rank == 2:
            buf.backend.memory.native.set_fault(
                "put", "damage", passes=1
            )  # after the one about its wire format
        buf.combine(out.x, out.handle, wire=wire)
        return buf, x, ids

    assert_named(all_ranks_raise(main, 4, 2), source=2, destination=0, token=2, phase="sum", op="combine")


@pytest.mark.parametrize("action,put,token", [("damage", 1, 2), ("omit", 1, 0), ("omit", 2, 0)])
def test_a_wrong_row_of_the_rail_hop(action, put, token):
    """Rank 1 sends counts, five rows and their metadata over the rail; the gateway, rank 3, finds the first bad row."""

    def main(comm):
        buf, x, ids = inputs(comm, to=2)
        buf.dispatch(
            x, ids
        )  # the staging memory holds valid rows of an earlier call, which must not be accepted
        if comm.rank == 1:
            buf.backend.memory.native.set_fault("put", action, passes=put)
        buf.dispatch(x + 1, ids)
        return buf, x, ids

    assert_named(all_ranks_raise(main, 4, 2), source=1, destination=3, token=token, phase="forward")


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("action", ["damage", "omit"])
def test_a_wrong_row_of_the_node_hop(action, layout):
    """Rank 0 copies its rows to rank 1's window; the fourth copy is damaged."""

    def main(comm):
        buf, x, ids = inputs(comm, to=1)
        first = buf.dispatch(x, ids, layout=layout)
        comm.barrier()
        del first  # the next dispatch uses the same memory of the window
        if comm.rank == 0:
            buf.backend.memory.native.set_fault("copy", action, passes=3)
        buf.dispatch(x + 1, ids, layout=layout)
        return buf, x, ids

    assert_named(all_ranks_raise(main, 3, 3), source=0, destination=1, token=3, phase="arrive")


def test_a_wrong_scale():
    def main(comm):
        buf, x, ids = inputs(comm, to=1)
        if comm.rank == 0:
            buf.backend.memory.native.set_fault("copy", "damage", passes=3)  # row, scales, row, scales
        buf.dispatch((torch.randn(TOKENS, HIDDEN).to(torch.float8_e4m3fn), torch.rand(TOKENS, 1)), ids)
        return buf, x, ids

    assert_named(all_ranks_raise(main, 2, 2), source=0, destination=1, token=1, phase="arrive")


def test_a_wrong_copy_of_a_row_for_a_second_expert():
    """Two experts of rank 1 get every row of rank 0: the second copy of its second row is damaged."""

    def main(comm):
        buf, x, _ = inputs(comm, to=0, top_k=2)
        ids = torch.tensor([[4, 5]] * TOKENS)
        tokens = TOKENS if comm.rank == 0 else 0
        if comm.rank == 0:
            buf.backend.memory.native.set_fault("copy", "damage", passes=3)
        buf.dispatch(x[:tokens], ids[:tokens])
        return buf, x, ids

    assert_named(all_ranks_raise(main, 2, 2), source=0, destination=1, token=1, phase="arrive")


def test_rows_that_change_while_they_are_being_summed():
    """Rank 1 changes its rows after publishing them; rank 0 comes later and names the first changed row."""
    published = threading.Event()

    def main(comm):
        buf, x, ids = inputs(comm, to=1)
        out = buf.dispatch(x, ids)
        rows = out.handle.rows.copy_(out.x)
        if comm.rank == 0:
            assert published.wait(5)
            buf.combine(rows, out.handle)
        else:
            pending = buf.combine(rows, out.handle, async_op=True)
            time.sleep(0.3)
            rows[2, 7] += 1
            published.set()
            pending.wait()
        return buf, x, ids

    errors = all_ranks_raise(main, 2, 2)
    assert_named(errors, source=1, destination=0, token=2, phase="sum", op="combine")
