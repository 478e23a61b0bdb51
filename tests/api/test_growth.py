"""Buffers whose shape is set by the calls, and memory that grows: all results are compared with the oracle."""

import gc
import random

import growing
import joining
import pytest
import torch
import worlds
from emulated_gpu import either_world  # noqa: F401 - a fixture
from growing import EXPERTS, HIDDEN, TOP_K, step

import moecomm


@pytest.mark.parametrize("size,per_node", [(1, 1), (2, 2), (4, 2)])
def test_shape_comes_with_the_calls(either_world, size, per_node):  # noqa: F811
    """Only the number of experts is given. Calls of any size follow each other; one rank alone may have more tokens."""

    def main(comm):
        buf = moecomm.Buffer(comm)
        assert buf.num_bytes == 0 and buf.max_tokens is None
        r = random.Random(size)
        for seed in range(8):
            counts = [r.choice([0, 1, 15, 16, 17, 40, 90]) for _ in range(comm.size)]
            layout = r.choice(["expert", "rank"])
            step(buf, comm, counts, seed, layout=layout, **({} if seed else {"num_experts": EXPERTS}))
            assert buf.max_tokens >= max(counts)
        assert (buf.hidden, buf.num_experts, buf.top_k, buf.dtype) == (HIDDEN, EXPERTS, TOP_K, torch.float32)
        assert buf.num_bytes > 0
        buf.close()

    moecomm.run_local(main, size, ranks_per_node=per_node)


def test_steady_calls_exchange_nothing_else():
    """If there is space, ranks do not communicate except in the dispatch."""

    def main(comm):
        buf = moecomm.Buffer(comm, num_experts=EXPERTS)
        step(buf, comm, [16] * comm.size, 0)
        comm.collective.exchange = None  # would raise an error
        for seed in range(3):
            step(buf, comm, [comm.size, 16], seed)

    moecomm.run_local(main, 2)


def test_part_of_the_shape():
    """Calls must match the given part of the shape."""

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=HIDDEN, dtype=torch.float32, max_tokens=8)
        x, ids = torch.zeros(2, 32), torch.zeros(2, 1, dtype=torch.int64)
        with pytest.raises(moecomm.InvalidArgument, match="num_experts is None"):
            buf.dispatch(x, ids)
        with pytest.raises(
            moecomm.InvalidArgument, match="hidden is 32 in this call; expected 64, as in the Buffer"
        ):
            buf.dispatch(x, ids, num_experts=4)
        with pytest.raises(moecomm.InvalidArgument, match=r"top_k is 5; expected 1\.\.4"):
            buf.dispatch(torch.zeros(2, HIDDEN), torch.zeros(2, 5, dtype=torch.int64), num_experts=4)
        step(buf, comm, [8, 3], 1, num_experts=EXPERTS)
        with pytest.raises(
            moecomm.InvalidArgument, match=r"9 tokens; expected at most max_tokens = 8|refused its part"
        ):
            step(buf, comm, [9, 3], 1)
        with pytest.raises(
            moecomm.InvalidArgument, match=r"num_experts is 4; expected 8, as in the Buffer|refused its part"
        ):
            step(buf, comm, [2, 3], 1, num_experts=4 if comm.rank == 0 else EXPERTS)
        step(buf, comm, [8, 8], 2)

    moecomm.run_local(main, 2)


def test_number_of_experts_of_a_decode_step():
    """Every step checks it, not only the first."""

    def main(comm):
        buf = moecomm.Buffer(comm)
        x, ids = torch.zeros(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64)
        for given, refused in (
            (EXPERTS, False),
            (None, False),
            (4 if comm.rank else EXPERTS, True),
            (EXPERTS, False),
        ):
            call = lambda given=given: buf.decode_dispatch(  # noqa: E731
                x, ids, quant=None, return_hook=False, num_experts=given
            )
            if refused:
                with pytest.raises(
                    moecomm.InvalidArgument,
                    match=r"num_experts is 4; expected 8, as in the Buffer|refused its part",
                ):
                    call()
            else:
                call()

    moecomm.run_local(main, 2, timeout=20)


def test_first_call_of_one_rank_is_wrong():
    """The call fails on all ranks, and the next call is the first one."""

    def main(comm):
        buf = moecomm.Buffer(comm, num_experts=EXPERTS)
        x = torch.zeros(2, HIDDEN)
        with pytest.raises(moecomm.InvalidArgument, match="topk_ids"):
            buf.dispatch(
                x,
                torch.zeros(2, dtype=torch.int64) if comm.rank == 1 else torch.zeros(2, 1, dtype=torch.int64),
            )
        with pytest.raises(
            moecomm.ConfigMismatch, match=f"hidden differs between ranks: rank 0 has {HIDDEN}, rank 1 has 32"
        ):
            buf.dispatch(x[:, : HIDDEN >> comm.rank].contiguous(), torch.zeros(2, 1, dtype=torch.int64))
        with pytest.raises(moecomm.InvalidArgument, match="x is a list"):
            buf.dispatch([1] if comm.rank else x, torch.zeros(2, 1, dtype=torch.int64))
        step(buf, comm, [4, 40], 3)

    moecomm.run_local(main, 2, timeout=20)


@pytest.mark.parametrize("bad", ["arguments", "picks", "both"])
def test_refusal_beside_growth(bad):
    """One rank has too many tokens, and another one invalid arguments: all ranks raise an error and stay in step."""

    def main(comm):
        buf = moecomm.Buffer(comm, num_experts=EXPERTS)
        step(buf, comm, [4, 4, 4, 4], 0)
        for wrong, large in ((0, 2), (2, 0), (1, 0)):
            count = 50 if comm.rank == large else 4
            x, ids = torch.zeros(count, HIDDEN), torch.zeros(count, TOP_K, dtype=torch.int64)
            ids[:] = torch.arange(TOP_K)
            if comm.rank == wrong and bad != "arguments":
                ids[1] = EXPERTS
            if comm.rank == wrong and bad == "arguments":
                ids = ids[:, :1]
            how = {"layout": "expert", "expert_alignment": 0} if comm.rank == large and bad == "both" else {}
            with pytest.raises(moecomm.InvalidArgument):
                buf.dispatch(x, ids, **how)
        assert buf.max_tokens == 16
        step(buf, comm, [4, 50, 4, 4], 1)
        assert buf.max_tokens == 64

    moecomm.run_local(main, 4, timeout=20)


def test_handles_of_other_buffers():
    """A handle is valid for all buffers with its shape and communicator, before their first call and after growth."""

    def main(comm):
        given = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=8, dtype=torch.float32
        )
        buf, other, fresh = (moecomm.Buffer(comm, num_experts=EXPERTS) for _ in range(3))
        _, out = step(buf, comm, [5, 7], 0)
        want = buf.combine(out.x.clone(), out.handle)
        step(buf, comm, [100, 7], 1)  # larger memory; the handle of `out` keeps the earlier memory
        for user in (buf, given, fresh, other):
            assert torch.equal(user.combine(out.x.clone(), out.handle), want)
            again = user.dispatch(want, handle=out.handle)
            assert again.x.shape == out.x.shape
        step(other, comm, [90, 90], 2)
        assert other.backend.memory.native is buf.backend.memory.native, (
            "buffers of one shape share their memory"
        )
        buf.close()
        step(other, comm, [9, 9], 3)
        smaller = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=1, max_tokens=8, dtype=torch.float32
        )
        with pytest.raises(moecomm.InvalidArgument, match="another communicator or shape"):
            smaller.combine(out.x.clone(), out.handle)

    moecomm.run_local(main, 2)


@pytest.mark.parametrize("per_node", [1, 2])
def test_arena_grows(per_node):
    """Results that are kept stay unchanged, and can be combined and dispatched again."""

    def main(comm):
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=64, dtype=torch.float32
        )
        first = buf.arena_bytes
        held = [step(buf, comm, [64, 64], seed)[1] for seed in range(30)]
        kept = [out.x.clone() for out in held]
        assert buf.arena_bytes >= 4 * first
        for out, x in zip(held, kept, strict=True):
            assert torch.equal(out.x, x)
        again = []
        for out, x in zip(held, kept, strict=True):  # the same plans, while all results are held
            y = buf.combine(x.clone(), out.handle)
            again.append(buf.dispatch(y, handle=out.handle))
            assert again[-1].x.shape == x.shape
            assert torch.equal(again[-1].source_token, out.source_token)
            assert torch.equal(again[-1].source_rank, out.source_rank)
        del again, held, out
        gc.collect()
        step(buf, comm, [64, 64], 99)

    moecomm.run_local(main, 2, ranks_per_node=per_node)


def test_same_plan_in_a_full_arena():
    """Rows of a plan whose memory is full keep their order: with alignment, capacity and both layouts."""

    def main(comm):
        for how in ({}, {"expert_alignment": 8}, {"layout": "rank"}, {"capacity": 400}):
            buf = moecomm.Buffer(
                comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=64, dtype=torch.float32
            )
            xs, ids, weights = worlds.random_world(
                comm.size, [64, 30], HIDDEN, EXPERTS, TOP_K, torch.float32, 5
            )
            r = comm.rank
            outs = [buf.dispatch(xs[r], ids[r], weights[r], **how) for _ in range(3)]
            back = [
                buf.dispatch(xs[r], topk_weights=weights[r], handle=out.handle)
                for out in outs
                for _ in range(3)
            ]
            for out in back:
                assert torch.equal(out.x, outs[0].x) and torch.equal(out.topk_weights, outs[0].topk_weights)
                if how.get("layout") == "rank":
                    assert torch.equal(out.topk_ids, outs[0].topk_ids)
            buf.close()

    moecomm.run_local(main, 2)


def test_training_holds_many():
    """The forward pass keeps the results of many layers, the backward pass adds one each, without arena options."""

    def main(comm):
        buf = moecomm.Buffer(comm, num_experts=EXPERTS)
        xs, ids, weights = worlds.random_world(
            comm.size, [64, 30], HIDDEN, EXPERTS, TOP_K, torch.float32, 5, masked=0
        )
        x = xs[comm.rank].requires_grad_()
        y = x
        for _ in range(9):
            out = buf.dispatch(y / TOP_K, ids[comm.rank], weights[comm.rank])
            y = buf.combine(out.x, out.handle)
        y.sum().backward()
        assert torch.allclose(x.grad, torch.ones_like(x), atol=1e-4)

    moecomm.run_local(main, 2)


def test_asynchronous_calls_grow():
    """Growth also works on the progress thread while the main thread communicates."""

    def main(comm):
        buf = moecomm.Buffer(comm, num_experts=EXPERTS)
        xs, ids, _ = worlds.random_world(
            comm.size, [300, 20], HIDDEN, EXPERTS, TOP_K, torch.float32, 5, masked=0
        )
        r = comm.rank
        pending = [buf.dispatch(xs[r][:n], ids[r][:n], async_op=True) for n in (3, 20, 300, 40)]
        comm.barrier()
        for out, n in zip([p.wait() for p in pending], (3, 20, 300, 40), strict=True):
            y = buf.combine(out.x.clone(), out.handle)
            assert torch.allclose(y, TOP_K * xs[r][:n], atol=1e-4)

    moecomm.run_local(main, 2)


def test_decode_without_a_shape():
    """The first decode call sets the shape. The largest rank, rounded up, sets the number of tokens."""

    def main(comm):
        buf = moecomm.Buffer(comm)
        xs, ids, weights = worlds.random_world(
            comm.size, [3, 20], HIDDEN, EXPERTS, TOP_K, torch.float32, 5, masked=0
        )
        r = comm.rank
        received, _ = buf.decode_dispatch(xs[r], ids[r], quant=None, return_hook=False, num_experts=EXPERTS)
        rows = received.handle.rows.copy_(received.x)
        y, _ = buf.decode_combine(rows, ids[r], weights[r], received.handle, return_hook=False)
        assert torch.allclose(y, xs[r] * weights[r].sum(1, keepdim=True), atol=1e-4)
        assert buf.decode_max_tokens == 32
        step(buf, comm, [100, 1], 0)
        received, _ = buf.decode_dispatch(xs[r], ids[r], quant=None, return_hook=False)
        assert int(received.counts.sum()) > 0

    moecomm.run_local(main, 2)


@pytest.mark.parametrize("per_node", [1, 2])
def test_processes(processes, tmp_path, per_node):
    assert joining.run(processes, tmp_path, 2, growing.over_processes, per_node) == [True, True]


def test_one_rank_records(tmp_path):
    """If one rank records, the buffer does not grow on any rank."""

    def main(comm):
        shape = dict(hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=64, dtype=torch.float32)
        buf = moecomm.Buffer(comm, **shape, record=tmp_path if comm.rank else None)
        held = []
        with pytest.raises(moecomm.CapacityExceeded):
            held.extend(step(buf, comm, [64, 64], seed)[1] for seed in range(99))
        held.clear()
        gc.collect()
        step(buf, comm, [64, 64], 0)
        buf.close()

    moecomm.run_local(main, 2, timeout=20)
