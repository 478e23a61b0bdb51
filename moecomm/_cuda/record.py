"""Recording in the cuda world. The data of a call is copied asynchronously; the host does not wait.

The picks and counters are copied on the stream of the call, and its times are those of events on this stream. They
become rows of the recording when the GPU has completed them.
"""

from __future__ import annotations

from typing import Any

import threading
import time
import weakref
from collections import deque
from functools import partial

import numpy as np
import torch

from . import cuda
from ..tracing.format import CALL, HOPS, PHASE, ids_dtype
from ..tracing.recorder import Segments
from ..shapes import QUANTS, SCALE_DTYPES

NOTHING = (0,) * len(HOPS)
QUANT_OF = dict(zip(SCALE_DTYPES, QUANTS))  # dtype of the scales -> quantization of the rows

_MOST_WAITING = 64  # notes that wait for the GPU; above this number, the host waits for the oldest


class DeviceRecorder:
    """The recording of one rank's calls on a GPU. As Recorder, but Python reports each call to it."""

    def __init__(self, path: str, memory: Any) -> None:
        self._comm, self._native, self._notes = memory.comm, memory.native, _Notes()
        self._calls = _Calls(memory.top_k, ids_dtype(memory.num_experts))
        self._plans: dict[Any, Any] = {}
        self._decoding, self._next_plan = [0, 0], 0
        self.forget_counts()
        self.segments = Segments(path, memory, self._calls)
        self._finalizer = weakref.finalize(self, _close, self._notes, self.segments)

    def start(self) -> Any:
        """Record an event on the current stream, at the begin or end of a call.

        Raises
        ------
        InvalidArgument
            A CUDA graph is captured.
        """
        cuda.refuse_capture("record", self._comm, "record=", "a recording notes every call on the host")
        return _event()

    def forget_counts(self) -> None:
        """Note that the counters of the buffer were reset."""
        self._counted, self._decode_counted = NOTHING, NOTHING

    def dispatch(
        self,
        began: Any,
        plan: Any,
        ids: Any,
        weights: Any,
        tokens: int,
        layout: str,
        alignment: int,
        capacity: int | None,
        coding: Any,
    ) -> None:
        """Record a dispatch that has ended. ids None: it reused the plan."""
        ended = self.start()
        if ids is not None:
            self._plans[id(plan)] = self._add_picks(ids, weights)
        self._add(
            "dispatch",
            plan,
            ids is None,
            tokens,
            weights is not None,
            layout,
            alignment,
            capacity,
            coding,
            began,
            ended,
        )

    def combine(self, began: Any, plan: Any, tokens: int, weighted: bool, layout: str, coding: Any) -> None:
        """Record a combine that has ended."""
        self._add("combine", plan, True, tokens, weighted, layout, 1, None, coding, began, self.start())

    def decode_dispatch(
        self,
        decode: Any,
        x: Any,
        ids: Any,
        weights: Any,
        quant: str | None,
        scale_layout: Any,
        return_hook: bool,
    ) -> Any:
        """Run and record Decode.dispatch."""
        began = self.start()
        received, hook = decode.dispatch(x, ids, weights, quant, scale_layout, True)
        ended = self.start()
        handle = received.handle
        plan = self._decoding[handle.epoch & 1] = self._add_picks(ids, weights)
        coding = QUANT_OF[x[1].dtype] if isinstance(x, tuple) else quant
        self._add_decode(
            "decode_dispatch", decode, plan, handle.tokens, weights is not None, coding, began, ended
        )
        return received, self._second("decode_receive", decode, hook, plan, handle.tokens, return_hook)

    def decode_combine(
        self,
        decode: Any,
        rows: Any,
        ids: Any,
        weights: Any,
        handle: Any,
        wire: str | None,
        return_hook: bool,
        out: Any,
    ) -> Any:
        """Run and record Decode.combine."""
        began = self.start()
        y, hook = decode.combine(rows, ids, weights, handle, wire, True, out)
        ended = self.start()
        plan = self._decoding[handle.epoch & 1]
        self._add_rows(None, weights)
        self._add_decode(
            "decode_combine", decode, plan, handle.tokens, weights is not None, wire, began, ended
        )
        return y, self._second("decode_sum", decode, hook, plan, handle.tokens, return_hook)

    def close(self) -> None:
        """Write the rest of the recording."""
        self._finalizer()

    def _second(self, op: str, decode: Any, hook: Any, plan: Any, tokens: int, return_hook: bool) -> Any:
        """Return a hook that records itself, or run it and return None."""
        hook = partial(self._receive, op, decode, hook, plan, tokens)
        return hook if return_hook else hook()

    def _receive(self, op: str, decode: Any, hook: Any, plan: Any, tokens: int) -> None:
        began = self.start()
        hook()
        self._add_decode(op, decode, plan, tokens, False, None, began, self.start())

    def _add_picks(self, ids: Any, weights: Any) -> Any:
        self._add_rows(ids, weights)
        self._next_plan += 1
        return self._next_plan - 1

    def _add_rows(self, ids: Any, weights: Any) -> None:
        copies = [None if t is None else t.detach().clone() for t in (ids, weights)]
        self._notes.add(
            _event(),
            lambda _: self._calls.add_rows(*(None if t is None else t.cpu().numpy() for t in copies)),
        )

    def _add(
        self,
        op: str,
        plan: Any,
        cached: Any,
        tokens: int,
        weighted: bool,
        layout: str,
        alignment: int,
        capacity: int | None,
        coding: Any,
        began: Any,
        ended: Any,
    ) -> None:
        before, self._counted = self._counted, _counts(self._native)
        self._add_call(
            (
                op,
                self._plans[id(plan)],
                cached,
                tokens,
                weighted,
                layout,
                alignment,
                -1 if capacity is None else capacity,
                coding or "",
            ),
            began,
            ended,
            before,
            self._counted,
        )

    def _add_decode(
        self,
        op: str,
        decode: Any,
        plan: Any,
        tokens: int,
        weighted: bool,
        coding: Any,
        began: Any,
        ended: Any,
    ) -> None:
        before, self._decode_counted = self._decode_counted, _counts(decode.native)
        self._add_call(
            (op, plan, False, tokens, weighted, "expert", 1, -1, coding or ""),
            began,
            ended,
            before,
            self._decode_counted,
        )

    def _add_call(self, call: Any, began: Any, ended: Any, before: Any, after: Any) -> None:
        def note(when: Any) -> None:
            times = when(began), when(ended)
            counts = [c if c is NOTHING else tuple(c.tolist()) for c in (before, after)]
            self._calls.add((*call, *times, 0, *(b - a for a, b in zip(*counts))))

        self._notes.add(_event(), note)


class _Calls:
    """The recorded calls, for the segments of the recording. There are no phases: kernels record no timeline."""

    def __init__(self, top_k: int, ids: Any) -> None:
        self._top_k, self._ids, self._lock = top_k, ids, threading.Lock()
        self.take()

    def add_rows(self, ids: Any, weights: Any) -> None:
        with self._lock:
            if ids is not None:
                self._parts[0].append(ids.astype(self._ids))
            if weights is not None:
                self._parts[1].append(weights.astype(np.float32))
            self.nbytes += sum(a.nbytes for a in (ids, weights) if a is not None)

    def add(self, call: Any) -> None:
        with self._lock:
            self._rows.append(call)
            self.nbytes += CALL.itemsize

    def take(self) -> Any:
        """Return (calls, phases, ids, weights) since the last take."""
        with self._lock:
            taken: Any = getattr(self, "_rows", []), getattr(self, "_parts", ([], []))
            self._rows: list[Any] = []
        self._parts: tuple[list[Any], list[Any]] = [], []
        self.nbytes = 0
        rows, (ids, weights) = taken
        return (
            np.array(rows, CALL),
            np.zeros(0, PHASE),
            np.concatenate([np.zeros((0, self._top_k), self._ids), *ids]),
            np.concatenate([np.zeros((0, self._top_k), np.float32), *weights]),
        )


class _Notes:
    """Functions to run after CUDA events, in order. They get the times of events by the clock of this process."""

    def __init__(self) -> None:
        self._waiting: Any = deque()
        self._last = _event()
        self._last.synchronize()
        self._last_ns = time.perf_counter_ns()

    def add(self, event: Any, work: Any) -> None:
        self._waiting.append((event, work))
        while self._waiting and (len(self._waiting) > _MOST_WAITING or self._waiting[0][0].query()):
            self._do()

    def finish(self) -> None:
        while self._waiting:
            self._do()

    def _do(self) -> None:
        event, work = self._waiting.popleft()
        event.synchronize()
        work(self._time_of)

    def _time_of(self, event: Any) -> Any:
        """Return the time of an event in nanoseconds of time.perf_counter_ns.

        Times are added from event to event, because CUDA returns differences as a float of milliseconds.
        """
        self._last_ns += round(1e6 * self._last.elapsed_time(event))
        self._last = event
        return self._last_ns


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _counts(native: Any) -> Any:
    return cuda.memory_of(native.counters())[: len(HOPS)].clone()


def _close(notes: Any, segments: Any) -> None:
    try:
        notes.finish()
    except (
        Exception
    ) as error:  # the GPU has failed: incomplete calls are not recorded, and all memory is released
        segments.fail(error)
    segments.close()
