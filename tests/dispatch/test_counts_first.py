"""PendingDispatch.wait_counts: counts and shapes of a dispatch before its rows have arrived."""

import json
import os
import signal
import threading

import counts_first
import pytest
import torch
import worlds
from emulated_gpu import either_world  # noqa: F401 - a fixture

import moecomm
from moecomm import reference

EXPERTS, TOP_K, HIDDEN = 8, 3, 64
SHAPE = dict(hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K)


def random_calls(comm, seed, counts):
    """Return this rank's (x, ids, weights) on its device, and the inputs of all ranks."""
    everyone = worlds.random_world(comm.size, counts, HIDDEN, EXPERTS, TOP_K, seed=seed)
    return [t[comm.rank].to(comm.device) for t in everyone], everyone


@pytest.mark.parametrize("size,per_node", [(1, 1), (4, 2)])
@pytest.mark.parametrize("how", [{}, {"layout": "rank"}, {"expert_alignment": 8}, {"capacity": 120}])
def test_counts_and_rows_equal_the_oracle(either_world, size, per_node, how):  # noqa: F811
    counts = [(9, 0, 24, 1)[r] for r in range(size)]

    def main(comm):
        mine, everyone = random_calls(comm, size, counts)
        want = reference.dispatch(*everyone, num_experts=EXPERTS, **{"layout": "expert", **how})[comm.rank]
        buf = moecomm.Buffer(comm, **SHAPE, max_tokens=24)
        pending = buf.dispatch(*mine, **how, async_op=True)
        early = pending.wait_counts()
        for name in ("tokens_per_expert", "rows_per_expert"):
            worlds.assert_same(getattr(early, name).cpu(), getattr(want, name), name)
        assert early.x.shape == want.x.shape and early.handle.num_rows == len(want.x)
        out = pending.wait()
        assert out is early and pending.wait_counts() is out
        worlds.assert_same(out.x.cpu(), want.x, "x")
        again = buf.dispatch(mine[0] + 1, handle=out.handle, async_op=True)  # with the plan of the first
        assert again.wait_counts().tokens_per_expert.tolist() == want.tokens_per_expert.tolist()
        real = want.source_rank.to(comm.device) >= 0
        assert torch.equal(again.wait().x[real], (out.x + 1)[real])

    moecomm.run_local(main, size, ranks_per_node=per_node)


@pytest.mark.parametrize("per_node", [1, 2])
@pytest.mark.parametrize("ending", ["continued", "killed", "left alone"])
def test_counts_come_before_a_stalled_payload(processes, tmp_path, per_node, ending):
    """Rank 1 is stopped between its counts and its rows; over UCX with one rank per node."""
    ranks = [
        processes.Process(target=counts_first.main, args=(str(tmp_path), r, per_node, ending))
        for r in range(counts_first.SIZE)
    ]
    try:
        for p in ranks:
            p.start()
        ranks[0].join(40)
        assert ranks[0].exitcode == 0
        seen = json.loads((tmp_path / "0.json").read_text())
        assert seen["stopped"] == "T" and seen["done"] is False, seen
        assert seen["counts"] and seen["same"] and seen["rows"] == [True, True], seen
        if ending == "continued":
            assert seen["kept"] and "error" not in seen, seen
            ranks[1].join(40)
            assert ranks[1].exitcode == 0
        else:
            error = "PeerLost" if ending == "killed" else "PeerTimeout"
            assert seen["error"]["type"] == error and seen["error"]["peer"] == 1 and seen["again"], seen
    finally:
        for p in ranks:
            p.kill()
            p.join()


def test_a_refusal_is_raised_by_both(either_world):  # noqa: F811
    """On the rank that refuses and on its peers, from wait_counts and from wait."""

    def main(comm):
        buf = moecomm.Buffer(comm, **SHAPE, max_tokens=8)
        x, ids = torch.ones(8, HIDDEN, dtype=torch.bfloat16), torch.tensor([[0, 3, 6]] * 8)
        if comm.rank == 1:
            ids[2, 1] = EXPERTS
        errors = []

        def call():
            pending = buf.dispatch(x.to(comm.device), ids.to(comm.device), async_op=True)
            for wait in (pending.wait_counts, pending.wait, pending.wait_counts):
                with pytest.raises(moecomm.InvalidArgument) as e:
                    wait()
                errors.append(e.value)

        if comm.gpu is None:
            call()
            assert len({str(e) for e in errors}) == 1
        else:  # the host waits for the counts in the call
            with pytest.raises(moecomm.InvalidArgument) as e:
                call()
            errors = [e.value]
        assert comm.rank == 1 or all(e.peer == 1 for e in errors)
        ids[2, 1] = 1
        pending = buf.dispatch(x.to(comm.device), ids.to(comm.device), async_op=True)  # all are in step
        assert sum(pending.wait_counts().tokens_per_expert.tolist()) == pending.wait().handle.num_rows

    moecomm.run_local(main, 2)


def test_gradients_come_with_the_result_of_wait(either_world):  # noqa: F811
    def main(comm):
        (x, ids, weights), everyone = random_calls(comm, 5, [9, 4])
        want = reference.dispatch(*everyone, num_experts=EXPERTS, layout="expert")[comm.rank]
        buf = moecomm.Buffer(comm, **SHAPE, max_tokens=24)
        x.requires_grad_()
        pending = buf.dispatch(x, ids, weights, async_op=True)
        early = pending.wait_counts()
        assert early.tokens_per_expert.tolist() == want.tokens_per_expert.tolist()
        out = pending.wait()
        assert out.x.requires_grad and early.x.data_ptr() == out.x.data_ptr() and torch.equal(early.x, out.x)
        buf.combine(out.x, out.handle).float().sum().backward()
        picks = (ids >= 0).sum(1)[:, None].to(x.dtype)
        assert torch.equal(x.grad, picks.expand_as(x))

    moecomm.run_local(main, 2)


def test_a_repeated_call_delivers_where_it_has_said():
    """Only node 1 has no space left: node 0 knows its counts before it learns that the call is repeated."""

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=4, top_k=2, max_tokens=32)
        x = torch.randn((32, HIDDEN), generator=torch.Generator().manual_seed(comm.rank)).bfloat16()
        everywhere, skewed = torch.tensor([[0, 3]] * 32), torch.tensor([[2, 3]] * 32)
        before, held, repeated = buf.arena_bytes, [], False
        while not repeated:
            held.append(buf.dispatch(x, skewed, layout="rank") if len(held) % 2 else None)
            pending = buf.dispatch(x, everywhere, async_op=True)
            early = pending.wait_counts()
            rows = early.x
            out = pending.wait()
            assert out is early and out.x is rows
            held.append(out if comm.rank > 1 else None)
            repeated = buf.arena_bytes > before
        xs = comm.exchange(x.float().flatten().tolist())
        want = torch.cat([torch.tensor(v).view(32, HIDDEN).bfloat16() for v in xs])
        assert len(rows) == (128 if comm.rank in (0, 3) else 0)
        if len(rows):
            worlds.assert_same(rows, want, f"rank {comm.rank}: x")
        y = buf.combine(out.x, out.handle)
        assert torch.equal(y, 2 * x)
        rows = out.handle.rows
        rows.copy_(out.x)
        assert torch.equal(buf.combine(rows, out.handle), 2 * x)

    moecomm.run_local(main, 4, ranks_per_node=2)


def test_never_waits_for_a_call_that_cannot_end(ctrl_c):
    """In a forked child, and inside another call: an error. Ctrl-C ends the wait."""
    comm = moecomm.Communicator("alone")
    buf = moecomm.Buffer(comm, **SHAPE, max_tokens=8)
    ready, release = threading.Event(), threading.Event()

    def hold():
        ready.set()
        release.wait(20)

    comm.order.submit(hold)
    ready.wait(20)
    pending = buf.dispatch(
        torch.ones(8, HIDDEN, dtype=torch.bfloat16), torch.tensor([[0, 3, 6]] * 8), async_op=True
    )
    pid = os.fork()
    if pid == 0:
        try:
            pending.wait_counts()
        except moecomm.InvalidArgument as error:
            os._exit(0 if "parent process" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        pending.wait_counts()
    release.set()
    assert pending.wait_counts() is pending.wait()
