"""Several combines with one handle: against the oracle, bit for bit, while peers are late; refusals of one of them."""

import time

import pytest
import torch
from decode_steps import check_dispatch, check_step, make_buffer
from worlds import assert_same, random_world

import moecomm
from moecomm import reference, reference_quant


def combine_again(
    comm, buf, world, recv, want, number, *, wire=None, travel=False, late=None, return_hook=True
):
    """Combine other rows with other weights, from a tensor of the caller, and compare the sums."""
    xs, ids, weights = world
    rows = [(w.x.float() * (rank + 2 + 3 * number)).to(w.x.dtype) for rank, w in enumerate(want)]
    scaled = weights if travel else [w * (number + 1) for w in weights]
    expected = reference.decode_combine(
        rows,
        ids,
        scaled,
        num_experts=buf.num_experts,
        weights_travel=travel,
        ranks_per_node=comm.ranks_per_node,
        wire=reference_quant.wire(wire),
    )
    r = comm.rank
    y, hook = buf.decode_combine(
        rows[r].clone(),
        ids[r],
        None if travel else scaled[r],
        recv.handle,
        wire=wire,
        return_hook=return_hook,
        out=torch.full(xs[r].shape, float("nan"), dtype=xs[r].dtype),
    )
    if late == comm.rank:
        time.sleep(0.05)  # the others are ready for the next combine, and this rank has not read the rows yet
    if hook:
        hook()
    assert_same(y, expected[r], f"rank {r}, combine {number}: y")
    return hook


@pytest.mark.parametrize("travel,wire", [(False, None), (True, None), (False, "fp8"), (True, "logfmt10")])
@pytest.mark.parametrize("nodes,per_node", [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_combines_with_one_handle(nodes, per_node, travel, wire):
    size = nodes * per_node
    worlds = [random_world(size, [3, 8, 0, 5][:size], 64, 4 * size, 4, seed=s) for s in range(3)]

    def main(comm):
        buf = make_buffer(comm, worlds[0], decode=True)
        for i, world in enumerate(worlds):
            recv, want = check_dispatch(comm, buf, world, weights_travel=travel)
            first = None
            for number in range(4):
                hook = combine_again(
                    comm,
                    buf,
                    world,
                    recv,
                    want,
                    number,
                    wire=wire if number % 2 else None,
                    travel=travel,
                    late=(i + number) % size,
                    return_hook=number < 3,
                )
                first = first or hook
            first()  # it was called before: nothing happens
            check_step(comm, buf, world, wire=wire, weights_travel=travel)

    moecomm.run_local(main, size, ranks_per_node=per_node, timeout=20)


def test_the_rows_in_the_window_may_be_combined_again():
    world = random_world(2, 5, 64, 8, 3, seed=7)

    def main(comm):
        buf, r = make_buffer(comm, world), comm.rank
        recv, _ = check_dispatch(comm, buf, world)
        recv.handle.rows.copy_(recv.x)
        arguments = recv.handle.rows, world[1][r], world[2][r], recv.handle
        assert (
            torch.equal(recv.counts_as(torch.int32), recv.counts.int())
            and recv.counts_as(torch.int32).dtype is torch.int32
        )
        with pytest.raises(moecomm.InvalidArgument, match=r"dtype is torch\.int16"):
            recv.counts_as(torch.int16)
        first = buf.decode_combine(*arguments, return_hook=False)[0]
        second, hook = buf.decode_combine(*arguments)
        hook()
        assert_same(second, first, "the same rows and weights")

    moecomm.run_local(main, 2, timeout=20)


@pytest.mark.parametrize("per_node", [3, 1])
def test_handles_of_two_dispatches_in_turn(per_node):
    """Both live handles are combined again after the later dispatch."""
    worlds = [random_world(3, 6, 64, 12, 3, seed=s) for s in range(2)]

    def main(comm):
        buf = make_buffer(comm, worlds[0])
        made = [check_dispatch(comm, buf, world) for world in worlds]
        for number in range(3):
            for world, (recv, want) in zip(worlds, made, strict=True):
                combine_again(comm, buf, world, recv, want, number, late=number)
        check_step(comm, buf, worlds[0])

    moecomm.run_local(main, 3, ranks_per_node=per_node, timeout=20)


@pytest.mark.parametrize("per_node", [2, 1])
def test_a_refused_further_combine_ends_the_step(per_node):
    world = random_world(2, 6, 64, 8, 4, seed=9, masked=0)

    def main(comm):
        buf, r = make_buffer(comm, world), comm.rank
        for odd in (0, 1):
            recv, want = check_dispatch(comm, buf, world)
            combine_again(comm, buf, world, recv, want, 0)
            with pytest.raises(moecomm.InvalidArgument) as raised:
                buf.decode_combine(
                    want[r].x[:1] if r == odd else want[r].x,
                    world[1][r],
                    world[2][r],
                    recv.handle,
                    return_hook=False,
                )
            assert ("rows is" in str(raised.value)) == (r == odd)
            assert raised.value.peer == (None if r == odd else odd)
            with pytest.raises(
                moecomm.InvalidArgument,
                match=r"handle is over, because a rank has refused|this rank has refused its combine",
            ):
                buf.decode_combine(want[r].x, world[1][r], world[2][r], recv.handle)
            check_step(comm, buf, world)

    moecomm.run_local(main, 2, ranks_per_node=per_node, timeout=20)


def test_ranks_that_disagree_about_a_further_combine():
    world = random_world(2, 6, 64, 8, 4, seed=9, masked=0)

    def main(comm):
        buf, r = make_buffer(comm, world), comm.rank
        recv, want = check_dispatch(comm, buf, world)
        combine_again(comm, buf, world, recv, want, 0)
        with pytest.raises(moecomm.ConfigMismatch):
            buf.decode_combine(
                want[r].x,
                world[1][r],
                world[2][r],
                recv.handle,
                wire="fp8" if r else None,
                return_hook=False,
            )
        check_step(comm, buf, world)

    moecomm.run_local(main, 2, ranks_per_node=1, timeout=20)
