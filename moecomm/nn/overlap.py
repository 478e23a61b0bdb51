"""Overlap: one micro-batch computes while the other communicates; and traces that show it.

A layer is a sequence of stages, callables from state to state. A stage that starts a communication returns at once with
something to wait for (a Pending, or Started around a hook of the decode path); two_batches then lets the other batch
compute until that one communicates too.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidArgument

if TYPE_CHECKING:
    import os

    from ..buffer import Buffer
    from ..communicator import Communicator
    from .layer import MoE


class Started:
    """A communication that is under way, and what its end makes of the state.

    Parameters
    ----------
    pending : Pending or callable
        Waited for by .wait(), or by calling it (a hook of the decode path).
    then : callable, optional
        From what that returns to the next state; None: it is the next state.
    """

    def __init__(self, pending: Any, then: Callable[[Any], Any] | None = None) -> None:
        self._pending, self._then = pending, then

    def wait(self) -> Any:
        """The next state, when the communication is complete."""
        result = self._pending.wait() if hasattr(self._pending, "wait") else self._pending()
        return result if self._then is None else self._then(result)

    @property
    def span(self) -> tuple[float, float] | None:
        """(begin, end) of the call where it ran, in seconds of time.perf_counter(); None for a hook."""
        return getattr(self._pending, "span", None)


def two_batches(
    layer_stages: Iterable[Callable[[Any], Any] | tuple[str, Callable[[Any], Any]]],
    batch_a: Any,
    batch_b: Any,
    *,
    trace: Trace | None = None,
) -> tuple[Any, Any]:
    """Run two micro-batches through the same stages, each computing while the other communicates.

    Whoever has started a communication gives way; the other goes on until it has started one too. The order in which
    communications start depends on the stages alone, so it is the same on all ranks. Differentiable where the stages are.

    Parameters
    ----------
    layer_stages : sequence of callables, or of (name, callable)
        Called as stage(state) -> state, or -> something with wait() -> state. Those of several layers, one after the other.
    batch_a, batch_b : object
        The first states.
    trace : Trace, optional
        Takes every stage's span.

    Returns
    -------
    (object, object)
        The last states.

    Raises
    ------
    InvalidArgument
        A stage is not callable.

    Source: DeepSeek-V3 technical report, section 3.4.1 (two micro-batches in prefill) and 3.4.2 (decode).
    """
    stages = [
        stage if isinstance(stage, tuple) else (getattr(stage, "__name__", f"stage {i}"), stage)
        for i, stage in enumerate(layer_stages)
    ]
    for name, stage in stages:
        if not callable(stage):
            raise InvalidArgument(
                f"layer_stages: {name} is a {type(stage).__qualname__}; expected a callable", op="two_batches"
            )
    lanes = [_Lane("a", batch_a, stages, trace), _Lane("b", batch_b, stages, trace)]
    turn = 0
    while not (lanes[0].finished and lanes[1].finished):
        if lanes[turn].finished:
            turn = 1 - turn
        lanes[turn].advance()
        turn = 1 - turn
    return lanes[0].state, lanes[1].state


class _Lane:
    """One micro-batch on its way through the stages."""

    def __init__(self, name: str, state: Any, stages: Any, trace: Trace | None) -> None:
        self.state, self._name, self._stages, self._trace = state, name, stages, trace
        self._next = 0
        self._started: tuple[str, Any] | None = None

    @property
    def finished(self) -> bool:
        return self._started is None and self._next == len(self._stages)

    def advance(self) -> None:
        """Wait for what is under way, then compute until something is under way again."""
        if self._started is not None:
            name, started = self._started
            with _range(self._trace, "wait", f"{self._name}: {name}"):
                self.state = started.wait()
            if self._trace is not None:
                self._trace.add_call(f"{self._name}: {name}", getattr(started, "span", None))
            self._started = None
        while self._next < len(self._stages) and self._started is None:
            name, stage = self._stages[self._next]
            self._next += 1
            with _range(self._trace, "compute", f"{self._name}: {name}"):
                result = stage(self.state)
            if hasattr(result, "wait"):
                self._started = name, result
            else:
                self.state = result


def moe_stages(
    moe: MoE, attention: Callable[[Any], Any] | None = None
) -> list[tuple[str, Callable[[Any], Any]]]:
    """The stages of one layer around a moecomm.nn.MoE: attention, dispatch, experts, combine, each with its residual.

    Parameters
    ----------
    moe : moecomm.nn.MoE
    attention : callable, optional
        From x [T, hidden] to what is added to it.

    Returns
    -------
    list of (str, callable)
        From x [T, hidden] to x [T, hidden]. The shared experts run while the rows travel back.
    """
    buffer = moe.buffer

    def attend(x: torch.Tensor) -> Any:
        return x if attention is None else x + attention(x)

    def dispatch(x: torch.Tensor) -> Any:
        ids, weights, *_ = moe.gate(x)
        return Started(moe.start_dispatch(x, ids, weights), lambda out: (x, out))

    def experts(state: Any) -> Any:
        x, out = state
        return x, out, moe.experts(out.x, out.rows_per_expert)

    def combine(state: Any) -> Any:
        x, out, rows = state
        pending = buffer.combine(rows, out.handle, topk_weights=out.topk_weights, async_op=True)
        rest = x if moe.shared_experts is None else x + moe.shared_experts(x)
        return Started(pending, lambda y: rest + y)

    stages = [("dispatch", dispatch), ("experts", experts), ("combine", combine)]
    return stages if attention is None else [("attention", attend), *stages]


class Trace:
    """What ran when on this rank: stages, calls on the progress thread, and the roles inside all calls of some buffers.

    A context manager. Stages are torch.profiler.record_function ranges too, so that they appear in its traces.

    Parameters
    ----------
    *buffers : Buffer
        Their roles (announce, send, forward, decode pack, ...) are recorded.

    Raises
    ------
    InvalidArgument
        A buffer has a recording of its own (Buffer(..., record=PATH)), which holds its roles.
    """

    def __init__(self, *buffers: Buffer) -> None:
        self._buffers = buffers
        self._events: list[tuple[str, str, float, float]] = []

    def __enter__(self) -> Trace:
        for buffer in self._buffers:
            if buffer._recorder is not None:
                raise InvalidArgument(
                    "Trace: a buffer records its calls and their roles already; expected one without record=",
                    op="Trace",
                )
            _trace(buffer, True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._collect()
        for buffer in self._buffers:
            _trace(buffer, False)

    def _collect(self) -> None:
        for buffer in self._buffers:
            for native in _natives(buffer):
                for role, begin, end in native.take_timeline():
                    self.add("roles", role, begin, end)

    def add(self, track: str, name: str, begin: float, end: float) -> None:
        """Take a span: begin and end in seconds of time.perf_counter()."""
        self._events.append((track, name, begin, end))

    def add_call(self, name: str, span: tuple[float, float] | None) -> None:
        """Take the span of a call on the progress thread, where it has one."""
        if span is not None:
            self.add("progress thread", name, *span)

    def spans(self, track: str | None = None) -> list[tuple[str, str, float, float]]:
        """[(track, name, begin, end)] of one track or all, by begin."""
        self._collect()
        return sorted((e for e in self._events if track in (None, e[0])), key=lambda e: e[2])

    def save(self, path: str | os.PathLike[str], comm: Communicator | None = None) -> None:
        """Write Chrome/Perfetto JSON: one process per rank, one thread per track.

        Parameters
        ----------
        path : str or Path
        comm : Communicator, optional
            Collective then: rank 0 writes the spans of all ranks. They share a time axis where they share a host.
        """
        everyone = (
            {0: self.spans()} if comm is None else dict(enumerate(comm._exchange(self.spans(), "save")))
        )
        if comm is not None and comm.rank:
            return
        tracks = ("compute", "wait", "progress thread", "roles")
        events = []
        for rank, spans in everyone.items():
            events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
            events += [
                {"ph": "M", "pid": rank, "tid": i, "name": "thread_name", "args": {"name": track}}
                for i, track in enumerate(tracks)
            ]
            for track, name, begin, end in spans:
                tid = tracks.index(track) if track in tracks else len(tracks)
                events.append(
                    {
                        "ph": "X",
                        "pid": rank,
                        "tid": tid,
                        "name": name,
                        "cat": track,
                        "ts": begin * 1e6,
                        "dur": (end - begin) * 1e6,
                    }
                )
        with open(path, "w") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)


def _natives(buffer: Buffer) -> list[Any]:
    return [buffer._native] if buffer._decode is None else [buffer._native, buffer._decode.native]


def _trace(buffer: Buffer, on: bool) -> None:
    buffer._tracing = on  # a decode path that is made later asks
    for native in _natives(buffer):
        native.trace(on)


@contextlib.contextmanager
def _range(trace: Trace | None, track: str, name: str) -> Iterator[None]:
    with torch.profiler.record_function(f"moecomm {track} {name}"):
        begin = time.perf_counter()
        try:
            yield
        finally:
            if trace is not None:
                trace.add(track, name, begin, time.perf_counter())
