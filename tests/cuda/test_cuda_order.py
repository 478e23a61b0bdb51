"""Asynchronous calls of the cuda world, their order: Pending's own code over streams that run in any order CUDA allows.

A stream here is a queue of work; what its head waits for decides whether it may run, and a seed decides
which of those that may run does. That is all that CUDA promises of streams and events. The same calls on a
GPU: tests/cuda/test_cuda.py.
"""

import random
from types import SimpleNamespace

import pytest
import torch

from moecomm import cuda
from moecomm.calls import Calls


class Event:
    """Happens when its stream comes to it."""

    happened = False

    def query(self):
        return self.happened


class Stream:
    """Work in order; an Event that it waits for holds up what comes behind."""

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
    """The streams of a GPU, and which of them is current."""

    def __init__(self):
        self.streams = []
        self.current = Stream(self)

    def run(self, choose):
        """Until all are empty."""
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


class Buffer(Calls):
    """Calls of a communicator on a GPU."""

    def __init__(self):
        self.comm, self._hooks = (
            SimpleNamespace(device=torch.device("cuda"), _gpu=0, _stream=None, _require_here=lambda op: None),
            {},
        )

    def _require_open(self, op):
        """It is."""


@pytest.mark.parametrize("seed", range(50))
def test_the_callers_stream_is_ordered_before_and_after(machine, seed):
    """Two calls in flight: each reads what the caller's stream wrote before it, and the caller reads each
    after wait().
    """
    memory, seen, hooked, buf = {"x": 0, "a": 0, "b": 0}, [], [], Buffer()
    buf.register_hook("post_dispatch", hooked.append)

    def write(name, value):
        machine.current.queue.append(
            (None, lambda: memory.update({name: value() if callable(value) else value}))
        )

    def call(result, x):
        assert machine.current is machine.streams[1]  # beside the caller's, which may compute meanwhile
        write(result, lambda: 10 * memory[x])  # enqueued on the stream that is current, as kernels are
        return result

    write("x", 1)
    first = buf._call("dispatch", lambda x: call("a", x), True, False, "x")
    second = buf._call("combine", lambda x, handle: call("b", x), True, False, "a", None)
    assert (
        isinstance(first, cuda.Pending)
        and not first.done()
        and machine.current is machine.streams[0]
        and not hooked
    )
    assert first.wait() == "a" and hooked == ["a"]  # the host has waited for nothing
    machine.current.queue.append((None, lambda: seen.append(memory["a"])))
    assert second.wait() == "b"
    machine.current.queue.append((None, lambda: seen.append(memory["b"])))
    write("x", 2)  # behind both calls: they must not see it
    assert seen == [] and not first.event.query()
    machine.run(random.Random(seed).choice)
    assert seen == [10, 100] and first.done() and second.done()
    assert len(machine.streams) == 2  # one stream of the communicator's own serves all calls
