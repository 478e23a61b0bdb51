"""Failures in the cuda world, on a real or emulated GPU: the suspected rank, and the objects that stay usable."""

import pytest
import torch
from emulated_gpu import gpu  # noqa: F401 - a fixture
from worlds import assert_same, random_world

import moecomm
from moecomm import ops, reference

pytestmark = pytest.mark.usefixtures("gpu")
HIDDEN, TOKENS = 64, 6


def make(comm, **more):
    """Make a buffer with two experts per rank."""
    return moecomm.Buffer(
        comm, hidden=HIDDEN, num_experts=2 * comm.size, top_k=2, max_tokens=TOKENS, num_sms=2, **more
    )


def inputs(comm, seed=1):
    """Return this rank's x, ids and weights, and those of all ranks."""
    world = random_world(comm.size, TOKENS, HIDDEN, 2 * comm.size, 2, seed=seed)
    return [t[comm.rank].to(comm.device) for t in world], world


def run(main, nodes, per_node, timeout=10.0):
    """Run main(comm) on rank threads."""
    return moecomm.run_local(
        main, nodes * per_node, ranks_per_node=per_node, device="cuda:0", timeout=timeout
    )


@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 1), (2, 2)])
def test_ranks_that_disagree_about_a_dispatch_go_on(nodes, per_node):
    def main(comm):
        buf, ((x, ids, _), (xs, all_ids, _)) = make(comm), inputs(comm)
        for different in ({"layout": "rank"}, {"expert_alignment": 4}, {"quant": "fp8"}):
            with pytest.raises(moecomm.ConfigMismatch, match="called with another layout"):
                buf.dispatch(x, ids, **(different if comm.rank else {}))
        assert_same(
            buf.dispatch(x, ids).x.cpu(),
            reference.dispatch(xs, all_ids, num_experts=2 * comm.size)[comm.rank].x,
            "afterwards",
        )
        comm.barrier()

    run(main, nodes, per_node)


@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("odd", [0, 1])
def test_ranks_that_disagree_about_a_combine_do_not(nodes, per_node, odd):
    """Half a collective cannot be undone: the communicator breaks on all ranks at once, also for its other buffers."""

    def main(comm):
        buf, other, ((x, ids, weights), _) = make(comm), make(comm), inputs(comm)
        out = buf.dispatch(x, ids, weights)
        rows, handle = out.x.clone(), out.handle.tensor()
        comm.barrier()
        with pytest.raises(moecomm.ConfigMismatch, match=r"combine_slots on all"):
            if comm.rank == odd:
                ops.combine(rows, None, None, handle, buf.name, "expert", TOKENS)
            else:
                ops.combine_slots(rows, out.topk_weights.clone(), handle, buf.name, "expert", TOKENS)
            comm.synchronize()
        for again in (
            lambda: buf.dispatch(x, ids),
            lambda: other.dispatch(x, ids),
            lambda: other.decode_dispatch(x, ids),
            comm.barrier,
        ):
            with pytest.raises(moecomm.ConfigMismatch):
                again()

    run(main, nodes, per_node, timeout=20.0)


@pytest.mark.parametrize("nodes,per_node", [(1, 3), (3, 1)])
def test_a_rank_that_does_not_come(nodes, per_node):
    """The others name the missing rank, and later calls raise the same error at once. Local operations still work."""

    def main(comm):
        buf, ((x, ids, _), _) = make(comm), inputs(comm)
        comm.barrier()
        if comm.rank == 1:
            return None
        with pytest.raises(moecomm.PeerTimeout) as caught:
            buf.dispatch(x, ids)
        for again in (lambda: buf.dispatch(x, ids), comm.barrier):
            with pytest.raises(moecomm.PeerTimeout):
                again()
        assert float(torch.ones(3, device=comm.device).sum()) == 3
        return caught.value.peer

    assert set(run(main, nodes, per_node, timeout=1.5)) == {None, 1}


def test_a_bad_id_moves_nothing():
    def main(comm):
        buf, ((x, ids, _), (xs, all_ids, _)) = make(comm), inputs(comm)
        bad = ids.clone()
        bad[2, 0] = 2 * comm.size
        with pytest.raises(
            moecomm.InvalidArgument, match=f"expert id {2 * comm.size} is out of range in token 2"
        ):
            buf.dispatch(x, bad)
        assert_same(
            buf.dispatch(x, ids).x.cpu(), reference.dispatch(xs, all_ids, num_experts=2)[0].x, "afterwards"
        )

    run(main, 1, 1)


@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 1)])
def test_a_capacity_that_is_too_small(nodes, per_node):
    """The call is refused on all ranks; if the host did not wait, synchronize or the next call raises the error."""

    def main(comm):
        buf, ((x, ids, _), (xs, all_ids, _)) = make(comm), inputs(comm)
        for again in (comm.synchronize, lambda: buf.dispatch(x, ids)):
            buf.dispatch(x, ids, capacity=1)
            torch.cuda.current_stream().synchronize()
            comm.barrier()
            with pytest.raises(moecomm.CapacityExceeded, match="larger `capacity`"):
                again()
        assert_same(
            buf.dispatch(x, ids).x.cpu(),
            reference.dispatch(xs, all_ids, num_experts=2 * comm.size)[comm.rank].x,
            "afterwards",
        )
        comm.barrier()

    run(main, nodes, per_node)


def test_more_multiprocessors_than_there_are():
    """Ranks on one GPU share it: their kernels wait for each other, so all must be resident at once."""

    def main(comm):
        with pytest.raises(
            moecomm.InvalidArgument,
            match=r"num_sms is \d+, .* that share .* need \d+ multiprocessors together; expected at most \d+",
        ):
            moecomm.Buffer(
                comm, hidden=HIDDEN, num_experts=2 * comm.size, top_k=2, max_tokens=TOKENS, num_sms=130
            )
        for wrong in (0, 3, -2, 2.0, "all"):
            with pytest.raises(
                moecomm.InvalidArgument, match=f"num_sms is {wrong!r}; expected an even int >= 2"
            ):
                moecomm.Buffer(
                    comm, hidden=HIDDEN, num_experts=2 * comm.size, top_k=2, max_tokens=TOKENS, num_sms=wrong
                )

    run(main, 1, 2)
