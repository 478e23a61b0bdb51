"""The order of asynchronous calls in the cuda world: Pending on streams that run in any order that CUDA allows.

A stream here is a queue of work. Its first item is ready unless it waits for an event, and a seed chooses one of the
ready streams. CUDA promises no other order of streams and events. The same calls run on a GPU in
tests/cuda/test_cuda.py.
"""

import random
from types import SimpleNamespace

import pytest
import torch

from moecomm._cuda import streams
from moecomm._cuda.state import CudaState
from moecomm.calls import Calls
from moecomm.first_phase import take_first_phase
from moecomm.hooks import Hooks


class Event:
    """Complete once its stream has reached it."""

    happened = False

    def query(self):
        return self.happened


class Stream:
    """Runs work in order; the work after an Event waits for it."""

    def __init__(self, machine):
        self.machine, self.queue = machine, []
        machine.streams.append(self)

    def record_event(self):
        event = Event()
        self.queue.append((None, lambda: setattr(event, "happened", True)))
        return event

    def wait_event(self, event):
        self.queue.append((event, lambda: None))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def __enter__(self):
        self.before, self.machine.current = self.machine.current, self

    def __exit__(self, *_):
        self.machine.current = self.before


class Machine:
    """The streams of a GPU, with a current one."""

    def __init__(self):
        self.streams = []
        self.current = Stream(self)

    def run(self, choose):
        """Run until all streams are empty."""
        while any(s.queue for s in self.streams):
            able = [s for s in self.streams if s.queue and (s.queue[0][0] is None or s.queue[0][0].happened)]
            assert able, "streams wait for each other"
            choose(able).queue.pop(0)[1]()


@pytest.fixture
def machine(monkeypatch):
    m = Machine()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: m.current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None, priority=0: Stream(m))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return m


def calls_on_a_gpu():
    """Return Calls of a communicator on a GPU, and their Hooks."""
    comm = SimpleNamespace(
        device=torch.device("cuda"),
        gpu=0,
        cuda=CudaState(None, torch.device("cuda")),
        order=SimpleNamespace(require_here=lambda op: None),
        gpu_calls=SimpleNamespace(look=lambda op: None),
    )
    backend = SimpleNamespace(memory=SimpleNamespace(comm=comm, require_open=lambda op: None), hooks=Hooks())
    return Calls(backend), backend.hooks


@pytest.mark.parametrize("seed", range(50))
def test_the_callers_stream_is_ordered_before_and_after(machine, seed):
    """Two calls in flight: each reads the earlier writes of the caller's stream, and wait() orders their results."""
    memory, seen, hooked = {"x": 0, "a": 0, "b": 0}, [], []
    calls, hooks = calls_on_a_gpu()
    hooks.register("post_dispatch", hooked.append)

    def write(name, value):
        machine.current.queue.append(
            (None, lambda: memory.update({name: value() if callable(value) else value}))
        )

    def call(result, x):
        assert machine.current is machine.streams[1]  # not the caller's stream, which may run other work
        write(result, lambda: 10 * memory[x])  # on the current stream, like a kernel
        return result

    write("x", 1)
    first = calls.run("dispatch", lambda x: call("a", x), True, False, "x")
    second = calls.run("combine", lambda x, handle: call("b", x), True, False, "a", None)
    assert (
        isinstance(first, streams.Pending)
        and not first.done()
        and machine.current is machine.streams[0]
        and not hooked
    )
    assert first.wait() == "a" and hooked == ["a"]  # the host has not waited
    machine.current.queue.append((None, lambda: seen.append(memory["a"])))
    assert second.wait() == "b"
    machine.current.queue.append((None, lambda: seen.append(memory["b"])))
    write("x", 2)  # after both calls, which must not see it
    assert seen == [] and not first.event.query()
    machine.run(random.Random(seed).choice)
    assert seen == [10, 100] and first.done() and second.done()
    assert len(machine.streams) == 2  # the communicator uses one stream for all its calls


@pytest.mark.parametrize("capacity,counts", [(None, False), (9, False), (None, True)])
def test_counts_do_not_wait_for_the_rows(machine, capacity, counts):
    """The current stream waits for the whole call only if the host does not know the counts, or they come behind it."""
    calls, _ = calls_on_a_gpu()
    out = SimpleNamespace(handle=SimpleNamespace(capacity=capacity, has_counts=counts))

    def dispatch(_):
        machine.current.queue.append((None, lambda: None))
        return take_first_phase().finish(out)

    pending = calls.run("dispatch", dispatch, True, False, "x")
    assert isinstance(pending, streams.PendingDispatch) and take_first_phase() is None
    before = len(machine.current.queue)
    assert pending.wait_counts() is out and not pending.done()
    waits = [event for event, _ in machine.current.queue[before:]]
    assert waits == ([] if capacity is None and not counts else [pending.event])
    assert pending.wait() is out
    assert machine.current.queue[-1][0] is pending.event
    machine.run(random.Random(1).choice)
