"""Recording in the cuda world: what a Recorder notes about a call is on its way while the host goes on.

Copies of the picks and of the counters are made on the call's stream, its times are those of events there; all of them become
rows of the recording when the GPU has come to them.
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial

import torch

from . import cuda
from .record import HOPS, NOTHING, Recorder

_MOST_WAITING = 64   # notes; then the host waits for the oldest


class DeviceRecorder(Recorder):
    """One rank's recording of calls on a GPU."""

    def __init__(self, path, buffer):
        self._comm, self._notes = buffer.comm, _Notes()
        super().__init__(path, buffer)

    def _end_with(self, state):
        return partial(_close, self._notes, state)

    def start(self):
        """An event on the current stream, at a call's begin or end.

        Raises
        ------
        InvalidArgument
            A graph is captured.
        """
        cuda.refuse_capture("record", self._comm, "record=", "it notes every call")
        return _event()

    def _add_rows(self, ids, weights):
        copies = [None if t is None else t.detach().clone() for t in (ids, weights)]
        self._notes.add(_event(), lambda _: Recorder._add_rows(self, *(None if t is None else t.cpu() for t in copies)))

    def _add_call(self, call, began, ended, before, after):
        def note(when):
            times = when(began), when(ended)
            Recorder._add_call(self, call, *times, *(c if c is NOTHING else tuple(c.tolist()) for c in (before, after)))

        self._notes.add(_event(), note)

    @staticmethod
    def _counts(native):
        return cuda.memory_of(native.counters())[:len(HOPS)].clone()


class _Notes:
    """Work for when an event has happened, in order; and the time of events by this process's clock."""

    def __init__(self):
        self._waiting = deque()
        self._last = _event()
        self._last.synchronize()
        self._last_ns = time.perf_counter_ns()

    def add(self, event, work):
        self._waiting.append((event, work))
        while self._waiting and (len(self._waiting) > _MOST_WAITING or self._waiting[0][0].query()):
            self._do()

    def finish(self):
        while self._waiting:
            self._do()

    def _do(self):
        event, work = self._waiting.popleft()
        event.synchronize()
        work(self._time_of)

    def _time_of(self, event):
        """Nanoseconds of time.perf_counter_ns; from one event to the next, as an event's own time is a float of milliseconds."""
        self._last_ns += round(1e6 * self._last.elapsed_time(event))
        self._last = event
        return self._last_ns


def _event():
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _close(notes, state):
    notes.finish()
    state.close()
