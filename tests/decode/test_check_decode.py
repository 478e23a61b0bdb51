"""MOECOMM_CHECK=1 in decode: all modes work, and a damaged, stale or modified row is named on every rank."""

import itertools
import threading

import pytest
import torch
from decode_steps import check_step
from worlds import random_world

import moecomm

HIDDEN, TOKENS, SIZE, PER_NODE = 128, 5, 4, 2
QUANTS = [(None, "row"), ("fp8", "row"), ("fp8", "column"), ("fp8_ue8m0", "row"), ("fp8_ue8m0", "column")]
WIRES = [None, "fp8", "logfmt10"]


@pytest.fixture(autouse=True)
def check_mode(monkeypatch):
    monkeypatch.setenv("MOECOMM_CHECK", "1")


def inputs(comm, to):
    """Make a buffer, and inputs in which every token of every rank picks two experts of rank `to`."""
    buf = moecomm.Buffer(
        comm,
        hidden=HIDDEN,
        num_experts=4 * comm.size,
        top_k=2,
        max_tokens=TOKENS,
        decode=True,
        arena_bytes=1 << 16,
    )
    return (
        buf,
        torch.randn(TOKENS, HIDDEN).bfloat16(),
        torch.tensor([[4 * to + 2, 4 * to]] * TOKENS),
        torch.rand(TOKENS, 2),
    )


def all_ranks_raise(main):
    """Run main(comm) on all ranks, then steps until all ranks raise; return the CorruptRow of each rank."""

    def one(comm):
        with pytest.raises(moecomm.CorruptRow) as raised:
            buf, x, ids = main(comm)
            for _ in range(3):
                recv, _ = buf.decode_dispatch(x, ids, return_hook=False)
                buf.decode_combine(recv.handle.rows, ids, None, recv.handle, return_hook=False)
        return raised.value

    return moecomm.run_local(one, SIZE, ranks_per_node=PER_NODE, timeout=10)


def assert_named(errors, *, source, destination, token, phase, op):
    for rank, e in enumerate(errors):
        assert (e.rank, e.peer, e.source, e.destination, e.token) == (
            rank,
            source,
            source,
            destination,
            token,
        ), f"{rank}: {e}"
        assert f"source rank {source}, token {token}, for rank {destination}" in str(e)
    assert (errors[destination].op, errors[destination].phase) == (op, phase)
    assert errors[destination].expected != errors[destination].got


@pytest.mark.parametrize("weights_travel", [False, True])
def test_every_mode_works(weights_travel):
    """Five ways to send and three ways to answer, on one buffer: the modes reuse the same positions."""
    modes = list(itertools.product(QUANTS, WIRES, [False, True]))
    worlds = [
        random_world(SIZE, [(r + i) % (TOKENS + 1) for r in range(SIZE)], HIDDEN, 4 * SIZE, 4, seed=i)
        for i in range(len(modes))
    ]

    def main(comm):
        buf = moecomm.Buffer(
            comm,
            hidden=HIDDEN,
            num_experts=4 * SIZE,
            top_k=4,
            max_tokens=TOKENS,
            decode=True,
            arena_bytes=1 << 16,
        )
        for ((scheme, scale_layout), wire, in_place), world in zip(modes, worlds, strict=True):
            check_step(
                comm,
                buf,
                world,
                scheme=scheme,
                scale_layout=scale_layout,
                wire=wire,
                in_place=in_place,
                weights_travel=weights_travel,
            )

    moecomm.run_local(main, SIZE, ranks_per_node=PER_NODE, timeout=20)


@pytest.mark.parametrize("quant,scale_layout", QUANTS)
@pytest.mark.parametrize("destination", [1, 3], ids=["same node", "other node"])
def test_a_copy_that_goes_wrong(quant, scale_layout, destination):
    """The owner packs rows of rank 0, then of rank 1: the second expert's copy of the third row is damaged."""

    def main(comm):
        buf, x, ids, _ = inputs(comm, destination)
        tokens = TOKENS if comm.rank == 0 else 0
        if comm.rank == destination:
            copies = 2 if quant and scale_layout == "row" else 1  # a row, and its scales beside it
            buf.backend.memory.decode.native.set_fault("copy", "damage", passes=5 * copies)
        buf.decode_dispatch(
            x[:tokens], ids[:tokens], quant=quant, scale_layout=scale_layout, return_hook=False
        )
        return buf, x, ids

    assert_named(
        all_ranks_raise(main),
        source=0,
        destination=destination,
        token=2,
        phase="arrive",
        op="decode_dispatch",
    )


@pytest.mark.parametrize("quant", [None, "fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("action", ["damage", "omit"])
def test_a_wrong_message_between_nodes(quant, action):
    """Rank 1's fourth message is damaged or missing.

    A missing message leaves the message of two steps before in its place, which was valid then.
    """

    def main(comm):
        buf, x, ids, _ = inputs(comm, 3)
        for _ in range(2):
            buf.decode_dispatch(x, ids, quant=quant, return_hook=False)
        if comm.rank == 1:
            buf.backend.memory.decode.native.set_fault("put", action, passes=3)
        buf.decode_dispatch(x, ids, quant=quant, return_hook=False)
        return buf, x, ids

    assert_named(
        all_ranks_raise(main), source=1, destination=3, token=3, phase="arrive", op="decode_dispatch"
    )


def test_wrong_scales():
    """Only the scales of rank 0's second row are damaged, in the packed rows."""

    def main(comm):
        buf, x, ids, _ = inputs(comm, 1)
        tokens = TOKENS if comm.rank == 0 else 0
        if comm.rank == 1:
            buf.backend.memory.decode.native.set_fault(
                "copy", "damage", passes=2 * 2 + 1
            )  # row, scales, row, scales | row, scales
        buf.decode_dispatch(x[:tokens], ids[:tokens], return_hook=False)
        return buf, x, ids

    assert_named(
        all_ranks_raise(main), source=0, destination=1, token=1, phase="arrive", op="decode_dispatch"
    )


@pytest.mark.parametrize("weights_travel", [False, True])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("action", ["damage", "omit"])
def test_a_wrong_answer_between_nodes(wire, weights_travel, action):
    """Rank 3's answer to the third token of rank 0 is damaged, or missing: then an older answer is in its place."""

    def main(comm):
        buf, x, ids, weights = inputs(comm, 3)
        tokens = TOKENS if comm.rank == 0 else 0
        x, ids, weights = x[:tokens], ids[:tokens], weights[:tokens]

        def step(number, strike=False):
            recv, _ = buf.decode_dispatch(
                x + number,
                ids,
                topk_weights=weights if weights_travel else None,
                quant=None,
                return_hook=False,
            )
            for e, n in enumerate(recv.counts.tolist()):
                recv.handle.rows[e, :n] = recv.x[e, :n]
            if strike and comm.rank == 3:  # one answer per token, or per pick
                buf.backend.memory.decode.native.set_fault(
                    "put", action, passes=2 if weights_travel else 2 * 2
                )
            buf.decode_combine(
                recv.handle.rows,
                ids,
                None if weights_travel else weights,
                recv.handle,
                wire=wire,
                return_hook=False,
            )

        step(0), step(1), step(2, strike=True)
        return buf, x, ids

    assert_named(all_ranks_raise(main), source=3, destination=0, token=2, phase="sum", op="decode_combine")


@pytest.mark.parametrize("staged", [False, True])
def test_rows_that_change_while_they_are_being_summed(staged):
    """Rank 1's rows change after its combine has sent: rank 0, which reads them in place, detects the row."""
    answered, changed = threading.Event(), threading.Event()

    def main(comm):
        buf, x, ids, weights = inputs(comm, 1)
        tokens = TOKENS if comm.rank == 0 else 0
        x, ids, weights = x[:tokens], ids[:tokens], weights[:tokens]
        recv, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
        rows = recv.x.clone() if staged else recv.handle.rows.copy_(recv.x)
        _, hook = buf.decode_combine(rows, ids, weights, recv.handle)
        if comm.rank == 1:
            recv.handle.rows[0, 3, 7] += 1
            changed.set()
        if comm.rank == 0:
            assert changed.wait(5)
        hook()
        answered.set()
        return buf, x, ids

    assert_named(all_ranks_raise(main), source=1, destination=0, token=3, phase="sum", op="decode_combine")
