"""One rank refuses a collective call: all ranks get a typed error in that call, and the next calls are correct."""

import json
import threading
import time

import pytest
import refused_calls as calls
import torch
from emulated_gpu import emulated  # noqa: F401
from refused_calls import Step, refuse

import moecomm
from moecomm.balance import Placement

WORLDS = [(1, 2, 1), (2, 1, 0), (2, 2, 0), (2, 2, 3)]  # nodes, ranks per node, the rank that refuses


def run(main, nodes, per_node, timeout=120.0):
    """Run main(comm) on rank threads."""
    return moecomm.run_local(main, nodes * per_node, ranks_per_node=per_node, timeout=timeout)


@pytest.mark.parametrize("nodes,per_node,odd", WORLDS)
def test_a_dispatch_is_refused(nodes, per_node, odd):
    def main(comm):
        step = Step(comm)
        for name in calls.DISPATCHES:
            calls.refused_dispatch(step, name, {odd})
            step.round_trip()
        calls.refused_redispatch(step, {odd})
        step.round_trip()

    run(main, nodes, per_node)


@pytest.mark.parametrize("nodes,per_node,odd", WORLDS)
def test_a_combine_is_refused(nodes, per_node, odd):
    def main(comm):
        step = Step(comm)
        for name in calls.COMBINES:
            calls.refused_combine(step, name, {odd}, slots=name in ("rows", "no handle"))
            step.round_trip()

    run(main, nodes, per_node)


@pytest.mark.parametrize("nodes,per_node,odd", WORLDS)
def test_a_decode_step_is_refused(nodes, per_node, odd):
    def main(comm):
        step = Step(comm)
        for name in calls.DECODE_DISPATCHES:
            calls.refused_decode_dispatch(step, name, {odd})
            step.decode()
        for name in calls.DECODE_COMBINES:
            calls.refused_decode_combine(step, name, {odd})
            step.decode()
        step.round_trip()

    run(main, nodes, per_node)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("refusing", [{0, 1, 2, 3}, {1, 3}])
def test_several_ranks_refuse_and_all_of_them(refusing, check, monkeypatch):
    """Each refusing rank raises its own error; the others name the first refusing rank."""
    monkeypatch.setenv("MOECOMM_CHECK", str(int(check)))

    def main(comm):
        step = Step(comm)
        for _ in range(2):
            calls.refused_dispatch(step, "dtype", refusing)
            calls.refused_dispatch(step, "an id", refusing)
            calls.refused_combine(step, "rows", refusing)
            step.round_trip()
            calls.refused_decode_dispatch(step, "dtype", refusing)
            calls.refused_decode_dispatch(step, "an id", refusing)
            step.decode()
            if len(refusing) == comm.size:
                calls.refused_decode_combine(step, "rows", refusing)
            step.decode()

    run(main, 2, 2)


@pytest.mark.parametrize("nodes,per_node,odd", [(1, 2, 1), (2, 1, 0), (2, 2, 2)])
def test_processes(processes, tmp_path, nodes, per_node, odd):
    size = nodes * per_node
    ranks = [
        processes.Process(target=calls.main, args=(tmp_path, r, size, per_node, {odd})) for r in range(size)
    ]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(120)
    assert [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(size)] == [{"good": True}] * size


@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 1)])
def test_a_hook_that_is_left_out_does_not_hide_the_next_step(nodes, per_node):
    """A rank may call its hook late, or never.

    The hook reports the refusal, and the next step is in step.
    """

    def main(comm):
        step = Step(comm)
        for late in (True, False):
            x, ids, _ = step.next_inputs()
            if comm.rank == 0:
                with pytest.raises(moecomm.InvalidArgument):
                    step.buf.decode_dispatch(x[:, :8], ids)
            else:
                hook = step.buf.decode_dispatch(x, ids, quant=None)[1]
            step.buf.decode_dispatch(x, ids, quant=None, return_hook=False)
            if comm.rank and late:
                with pytest.raises(moecomm.InvalidArgument, match="rank 0 refused its part"):
                    hook()
            step.decode()

    run(main, nodes, per_node)


@pytest.mark.parametrize("mode,activate", [("optimal", None), ("local", None)])
def test_replicas(mode, activate):
    """If the choice of replicas needs an exchange, the refusal is part of it."""

    def main(comm):
        placement = (
            Placement(torch.arange(8).repeat(1, 2)[:, :8], 8, comm.size, comm.num_nodes)
            if mode == "local"
            else Placement(torch.tensor([[0, 1, 2, 3, 2, 3, 4, 5]]), 6, comm.size, comm.num_nodes)
        )
        buf = moecomm.Buffer(
            comm,
            hidden=16,
            num_experts=placement.num_experts,
            top_k=2,
            max_tokens=4,
            placement=placement,
            replicas=mode,
        )
        x, ids = (
            torch.full((4, 16), float(comm.rank)).bfloat16(),
            torch.tensor([[0, 1], [2, 3], [4, 5], [1, 2]]),
        )
        step = type("", (), {"comm": comm})
        bad = ids.clone()
        bad[0, 0] = 77
        for wrong, why in ((x.float(), "arguments"), (x[:, :8], "arguments")):
            refuse(step, lambda wrong=wrong: buf.dispatch(wrong, ids), lambda: buf.dispatch(x, ids), {1}, why)
            refuse(
                step,
                lambda wrong=wrong: buf.decode_dispatch(wrong, ids, quant=None),
                lambda: buf.decode_dispatch(x, ids, quant=None, return_hook=False),
                {1},
                why,
            )
        refuse(step, lambda: buf.dispatch(x, bad), lambda: buf.dispatch(x, ids), {0}, "topk_ids")
        refuse(
            step,
            lambda: buf.decode_dispatch(x, bad, quant=None),
            lambda: buf.decode_dispatch(x, ids, quant=None, return_hook=False),
            {0},
            "",
        )
        refuse(step, lambda: buf.dispatch(x, ids, layer=3), lambda: buf.dispatch(x, ids), {1})
        out = buf.dispatch(x, ids)
        y = buf.combine(out.x, out.handle)
        assert torch.equal(y, 2 * x)
        recv, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
        assert int(recv.counts.sum()) >= 0
        comm.barrier()

    run(main, 2, 1)


@pytest.mark.parametrize("nodes,per_node,odd", [(1, 2, 0), (2, 1, 1), (2, 2, 3)])
def test_a_gpu_s_dispatch_is_refused(nodes, per_node, odd, emulated):  # noqa: F811
    """The host waits for the counts, so the behavior is that of the cpu world."""

    def main(comm):
        step = Step(comm)
        for name in ("too many tokens", "dtype", "an id", "an id twice", "a hook", "an operator"):
            calls.refused_dispatch(step, name, {odd})
            step.round_trip()
        calls.refused_dispatch(step, "an id", set(range(comm.size)))
        step.round_trip()

    moecomm.run_local(main, nodes * per_node, ranks_per_node=per_node, device="cuda:0", timeout=120.0)


def test_a_gpu_s_calls_that_all_ranks_refuse(emulated):  # noqa: F811
    """All ranks know of the refusal and stay in step."""

    def main(comm):
        step = Step(comm)
        for name in ("rows", "no handle", "bias"):
            calls.refused_combine(step, name, {0, 1, 2, 3})
            step.round_trip()
        calls.refused_redispatch(step, {0, 1, 2, 3})
        step.round_trip()
        for name in calls.DECODE_DISPATCHES[:2]:
            calls.refused_decode_dispatch(step, name, {0, 1, 2, 3})
            step.decode()
        calls.refused_decode_combine(step, "rows", {0, 1, 2, 3})
        step.decode()

    moecomm.run_local(main, 4, ranks_per_node=2, device="cuda:0", timeout=120.0)


STRAYS = {
    "combine": lambda step, out, x, ids: step.buf.combine(out.x, out.handle),
    "decode": lambda step, out, x, ids: step.buf.decode_dispatch(x, ids, quant=None, return_hook=False),
    "another buffer": lambda step, out, x, ids: step.other.dispatch(x, ids),
}


@pytest.mark.parametrize("nodes,per_node,odd", [(1, 2, 0), (2, 1, 1), (2, 2, 3)])
@pytest.mark.parametrize("stray", list(STRAYS))
def test_ranks_that_make_different_calls_learn_it_at_once(stray, nodes, per_node, odd):
    """No rank waits for the deadline, and no rank gets rows."""

    def main(comm):
        step = Step(comm, decode=True)
        step.other = moecomm.Buffer(comm, hidden=16, num_experts=step.experts, top_k=2, max_tokens=8)
        out = step.dispatch()
        x, ids, _ = step.next_inputs()
        began = time.monotonic()
        with pytest.raises(moecomm.ConfigMismatch) as raised:
            STRAYS[stray](step, out, x, ids) if comm.rank == odd else step.buf.dispatch(x, ids)
        assert (
            time.monotonic() - began < 30 and raised.value.rank == comm.rank and raised.value.peer is not None
        )
        assert "same calls in the same order" in str(raised.value)
        with pytest.raises(moecomm.ConfigMismatch):
            step.buf.dispatch(x, ids)

    run(main, nodes, per_node, timeout=60.0)


def test_nobody_comes_to_a_call_that_is_refused():
    """The error says what is wrong and that the peers do not know of the refusal; it is raised after the timeout."""
    meeting = threading.Barrier(2)

    def main(comm):
        step = Step(comm)
        step.round_trip()
        if comm.rank == 0:
            with pytest.raises(moecomm.InvalidArgument, match="x is") as raised:
                step.buf.dispatch(torch.zeros(1), torch.zeros(1, 2).long())
            assert "could not be reported" in raised.value.__notes__[0]
        meeting.wait(30)

    run(main, 1, 2, timeout=1.0)


def test_a_closed_buffer_refuses_by_itself():
    def main(comm):
        step = Step(comm)
        step.round_trip()
        comm.barrier()
        step.buf.close()
        if comm.rank:
            with pytest.raises(moecomm.InvalidArgument, match="closed"):
                step.buf.dispatch(*step.next_inputs())

    run(main, 1, 2)
