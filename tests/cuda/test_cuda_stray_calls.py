"""Ranks of the cuda world that do not make the same call: a typed error on every rank in that call, when its host
waits for the call or for comm.synchronize() at the latest, and in every call after it.
"""

import threading
import time

import pytest
import refused_calls as calls
import torch
from emulated_gpu import emulated  # noqa: F401 - a fixture
from refused_calls import Step

import moecomm
from moecomm.fabric import Domain

WORLDS = [(1, 2, 0), (2, 1, 1), (2, 2, 3), (1, 3, 1)]  # nodes, ranks of a node, the odd rank
TIMEOUT = 60.0  # far longer than what any rank may take here


def run(main, nodes, per_node, timeout=TIMEOUT):
    """main(comm) on rank threads."""
    return moecomm.run_local(
        main, nodes * per_node, ranks_per_node=per_node, device="cuda:0", timeout=timeout
    )


class Verbs:
    """One right call of each kind on a rank that is ready for all of them."""

    def __init__(self, comm):
        self.comm = comm
        self.step = Step(comm, decode=True)
        self.other = moecomm.Buffer(comm, hidden=16, num_experts=self.step.experts, top_k=2, max_tokens=8)
        self.domain = Domain(comm, 4096)
        self.box = self.domain.tensor(4, torch.float32)
        self.out = self.step.dispatch()
        self.recv = self.decode_dispatch()[0]
        self.x, self.ids, self.weights = self.step.next_inputs()
        comm.synchronize()
        comm.barrier()

    def decode_dispatch(self):
        x, ids = self.ids_of_decode = self.step.next_inputs()[:2]
        return self.step.buf.decode_dispatch(x, ids, quant=None, return_hook=False)

    def call(self, name):
        buf, x, ids = self.step.buf, self.x, self.ids
        if name == "decode_combine":
            rows, handle = self.recv.handle.rows, self.recv.handle
            return lambda: buf.decode_combine(
                rows, self.ids_of_decode[1], self.weights, handle, return_hook=False
            )
        return {
            "dispatch": lambda: buf.dispatch(x, ids),
            "capacity": lambda: buf.dispatch(x, ids, capacity=64),
            "redispatch": lambda: buf.dispatch(x, handle=self.out.handle),
            "another buffer": lambda: self.other.dispatch(x, ids),
            "combine": lambda: buf.combine(self.out.x, self.out.handle),
            "asynchronous": lambda: buf.combine(self.out.x, self.out.handle, async_op=True).wait(),
            "decode_dispatch": lambda: buf.decode_dispatch(x, ids, quant=None, return_hook=False),
            "hook": self.hooked,
            "multicast": lambda: self.domain.multicast(range(self.comm.size), self.box, self.sent(0), root=0),
            "reduce": lambda: self.domain.reduce(range(self.comm.size), self.sent(0), self.box, root=0),
        }[name]

    def sent(self, root):
        return torch.ones_like(self.box) if self.comm.rank == root else None

    def hooked(self):
        self.step.buf.decode_dispatch(self.x, self.ids, quant=None)[1]()

    def ends(self, call, error=moecomm.ConfigMismatch, **raises):
        """The call ends the communicator: in it, or when its host waits for it."""
        began = time.monotonic()
        with pytest.raises(error, **raises) as raised:
            call()
            self.comm.synchronize()
        assert time.monotonic() - began < TIMEOUT / 2, "it was the deadline that ended it"
        return raised.value

    def is_over(self):
        for again in ("dispatch", "combine", "decode_dispatch", "another buffer", "multicast"):
            self.ends(self.call(again))
        for again in (self.comm.synchronize, self.comm.barrier):
            with pytest.raises(moecomm.ConfigMismatch):
                again()


# Not decode_dispatch with a hook: an emulated kernel runs while it is started, and the host of one that only sends
# waits until all others have started theirs.
KINDS = (
    "dispatch",
    "capacity",
    "redispatch",
    "another buffer",
    "combine",
    "asynchronous",
    "decode_dispatch",
    "decode_combine",
    "multicast",
    "reduce",
)
SAME = {"combine", "asynchronous"}
AGREE = {"multicast", "reduce"}  # ranks agree on the verb before one moves: they stay in step


@pytest.mark.parametrize("nodes,per_node,odd", WORLDS)
@pytest.mark.parametrize("stray", KINDS)
def test_ranks_that_make_different_calls_learn_it_in_that_call(stray, nodes, per_node, odd, emulated):  # noqa: F811
    for others in KINDS:
        if stray == others or {stray, others} == SAME:
            continue

        def main(comm, others=others):
            verbs = Verbs(comm)
            error = verbs.ends(verbs.call(stray if comm.rank == odd else others))
            assert error.rank == comm.rank and error.peer is not None
            if {stray, others} == AGREE:
                verbs.step.round_trip()
            else:
                verbs.is_over()

        run(main, nodes, per_node)


REFUSED = {
    "combine": lambda v: v.step.buf.combine(v.out.x[:-1], v.out.handle),
    "redispatch": lambda v: v.step.buf.dispatch(v.x[:2], handle=v.out.handle),
    "capacity": lambda v: v.step.buf.dispatch(v.x.float(), v.ids, capacity=64),
    "decode_dispatch": lambda v: v.step.buf.decode_dispatch(
        v.x.float(), v.ids, quant=None, return_hook=False
    ),
    "hook": lambda v: v.step.buf.decode_dispatch(v.x, v.ids[:1], quant=None)[1](),
    "decode_combine": lambda v: v.step.buf.decode_combine(
        v.recv.handle.rows, v.ids[:1], v.weights, v.recv.handle, return_hook=False
    ),
}
WRONG_IDS = {
    "capacity": lambda v: v.step.buf.dispatch(v.x, v.ids + v.step.experts, capacity=64),
    "decode_dispatch": lambda v: v.step.buf.decode_dispatch(
        v.x, v.ids + v.step.experts, quant=None, return_hook=False
    ),
    "decode_combine": lambda v: v.step.buf.decode_combine(
        v.recv.handle.rows, v.ids_of_decode[1].flip(1), v.weights, v.recv.handle, return_hook=False
    ),
}


OWN = (
    "expected",
    r"^(topk_ids: expert id|decode_combine: topk_ids of token)",
)  # the errors that name a rank's own argument


@pytest.mark.parametrize("nodes,per_node,odd", WORLDS)
@pytest.mark.parametrize("wrong", [REFUSED, WRONG_IDS], ids=["arguments", "ids"])
def test_where_one_refuses_all_others_learn_it_in_that_call(wrong, nodes, per_node, odd, emulated):  # noqa: F811
    """The host of none of these waits, so ranks go on, each to another point: that ends the communicator."""
    for name, call in wrong.items():

        def main(comm, name=name, call=call):
            verbs = Verbs(comm)
            if comm.rank == odd:
                verbs.ends(lambda: call(verbs), moecomm.InvalidArgument, match=OWN[wrong is WRONG_IDS])
            else:
                error = verbs.ends(verbs.call(name), match=f"rank {odd} refused its part in a")
                assert error.peer == odd
            verbs.is_over()

        run(main, nodes, per_node)


@pytest.mark.parametrize("nodes,per_node,odd", WORLDS[:3])
def test_a_dispatch_that_one_refuses_does_not_end_it(nodes, per_node, odd, emulated):  # noqa: F811
    """The hosts wait for the counts, so all ranks are in step."""

    def main(comm):
        step = Step(comm)
        for name in ("dtype", "an id"):
            calls.refused_dispatch(step, name, {odd})
            step.round_trip()
        comm.synchronize()

    run(main, nodes, per_node)


@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 2)])
def test_what_a_replayed_graph_does_is_counted(nodes, per_node, emulated):  # noqa: F811
    """Ranks that replay graphs of other calls learn it in that replay, and only then."""

    def main(comm):
        verbs = Verbs(comm)
        buf, x, ids, weights = verbs.step.buf, verbs.x, verbs.ids, verbs.weights
        y = [torch.empty_like(x) for _ in range(2)]
        with emulated.capture() as dispatches:
            out = buf.dispatch(x, ids, capacity=64)
            buf.combine(out.x, out.handle, out=y[0])
        with emulated.capture() as decodes:
            recv, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
            buf.decode_combine(recv.x, ids, weights, recv.handle, return_hook=False, out=y[1])
        for graph in (dispatches, decodes, decodes, dispatches):
            graph.replay()
        verbs.step.round_trip()  # in step
        verbs.ends((decodes if comm.rank == 0 else dispatches).replay)
        verbs.is_over()

    run(main, nodes, per_node)


@pytest.mark.parametrize("stray", ["hook", "dispatch"])
@pytest.mark.parametrize("nodes,per_node,odd", WORLDS)
def test_a_decode_dispatch_with_a_hook_against_a_dispatch(stray, nodes, per_node, odd, emulated):  # noqa: F811
    """In replays, where an emulated kernel that only sends does not wait for the start of the others'."""

    def main(comm):
        verbs = Verbs(comm)
        buf, x, ids = verbs.step.buf, verbs.x, verbs.ids
        graphs = {}
        with emulated.capture() as graphs["hook"]:
            verbs.hooked()
        y = torch.empty_like(x)
        with emulated.capture() as graphs["dispatch"]:
            out = buf.dispatch(x, ids, capacity=64)
            buf.combine(out.x, out.handle, out=y)
        for name in ("hook", "dispatch", "hook"):
            graphs[name].replay()
        verbs.step.round_trip()  # in step
        other = "dispatch" if stray == "hook" else "hook"
        error = verbs.ends(graphs[stray if comm.rank == odd else other].replay)
        assert error.rank == comm.rank and error.peer is not None
        verbs.is_over()

    run(main, nodes, per_node)


@pytest.mark.parametrize("asked", ["synchronize", "barrier", "another buffer", "combine", "decode_dispatch"])
@pytest.mark.parametrize("wrong", ["capacity", "decode_dispatch", "decode_combine"])
def test_a_wrong_id_in_a_replay_is_told_by_whatever_is_asked_first(wrong, asked, emulated):  # noqa: F811
    """No host has looked at the replay: the rank still names its own argument, once, and its peers name the rank."""

    def main(comm):
        verbs = Verbs(comm)
        buf, x, weights = verbs.step.buf, verbs.x, verbs.weights
        ids = {name: verbs.ids.clone() for name in ("capacity", "decode_dispatch", "decode_combine")}
        y = torch.empty_like(x)
        with emulated.capture() as graph:
            if wrong == "capacity":
                buf.dispatch(x, ids["capacity"], capacity=64)
            else:
                recv, _ = buf.decode_dispatch(x, ids["decode_dispatch"], quant=None, return_hook=False)
                rows, own = recv.x, ids["decode_combine"]
                buf.decode_combine(rows, own, weights, recv.handle, return_hook=False, out=y)
        graph.replay()
        comm.synchronize()
        comm.barrier()
        if comm.rank == 1:
            token = ids[wrong][2]
            token.copy_(token.flip(0) if wrong == "decode_combine" else token + verbs.step.experts)
        began = time.monotonic()
        graph.replay()
        assert time.monotonic() - began < TIMEOUT / 2, "it was the deadline that ended it"
        first = {"synchronize": comm.synchronize, "barrier": comm.barrier}.get(asked) or verbs.call(asked)
        if comm.rank == 1:
            error = verbs.ends(first, moecomm.InvalidArgument, match=OWN[True])
            assert "token 2" in str(error)
        else:
            error = verbs.ends(first, match="rank 1 refused its part in a")
            assert error.peer == 1
        verbs.is_over()

    run(main, 2, 2)


def test_a_slow_rank_is_waited_for(emulated):  # noqa: F811
    """Ranks that wait for long tell each other the same call, and go on; also where one is a call ahead."""

    def main(comm):
        step = Step(comm, decode=True)
        for n in range(6):
            if n % comm.size == comm.rank:
                time.sleep(0.05)
            x, ids, _ = step.next_inputs()
            _, hook = step.buf.decode_dispatch(x, ids, quant=None)
            if n % comm.size == comm.rank:
                time.sleep(0.05)
            hook()
            step.round_trip()
            step.decode()
        comm.synchronize()
        comm.barrier()

    run(main, 2, 2)


def test_synchronize_is_refused_where_nothing_can_wait(emulated):  # noqa: F811
    def main(comm):
        with (
            emulated.capture(),
            pytest.raises(moecomm.InvalidArgument, match="synchronize: a CUDA graph is captured"),
        ):
            comm.synchronize()
        comm.synchronize()

    run(main, 1, 1)


def test_all_ranks_wait_in_the_same_call(emulated):  # noqa: F811
    """A rank that never comes is still named by the deadline, by all others."""
    meeting = threading.Barrier(3)

    def main(comm):
        verbs = Verbs(comm)
        if comm.rank == 1:
            meeting.wait(60)
            return
        with pytest.raises(moecomm.PeerTimeout) as raised:
            verbs.call("combine")()
            comm.synchronize()
        assert raised.value.peer == 1
        for again in ("another buffer", "decode_dispatch"):
            with pytest.raises(moecomm.PeerTimeout):
                verbs.call(again)()
        meeting.wait(60)

    run(main, 1, 3, timeout=2.0)


def test_synchronize_of_the_cpu_world():
    def main(comm):
        step = Step(comm)
        out = step.dispatch()
        pending = step.buf.combine(out.x, out.handle, async_op=True)
        comm.synchronize()
        assert pending.done()
        comm.close()
        with pytest.raises(moecomm.InvalidArgument, match="synchronize: the communicator is closed"):
            comm.synchronize()

    moecomm.run_local(main, 2)
