"""Overlap of two micro-batches: one computes while the other communicates. Trace records when each ran.

A layer is a sequence of stages. A stage is a callable from a state to the next state. A stage that starts a
communication returns immediately, with an object to wait for: a Pending, or a Started around a hook of the decode
path. two_batches then runs the other batch until it has started a communication as well.
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
    """A communication that is under way, and the function that turns its result into the next state.

    Parameters
    ----------
    pending : Pending or callable
        The communication. A callable, such as a hook of the decode path, is called to complete it.
    then : callable, optional
        Maps the result to the next state. None: the result is the next state.
    """

    def __init__(self, pending: Any, then: Callable[[Any], Any] | None = None) -> None:
        self._pending, self._then = pending, then

    def wait(self) -> Any:
        """Wait until the communication is complete; return the next state."""
        result = self._pending.wait() if hasattr(self._pending, "wait") else self._pending()
        return result if self._then is None else self._then(result)

    @property
    def span(self) -> tuple[float, float] | None:
        """(begin, end) of the call on the progress thread, in seconds of time.perf_counter(); None for a hook."""
        return getattr(self._pending, "span", None)


def two_batches(
    layer_stages: Iterable[Callable[[Any], Any] | tuple[str, Callable[[Any], Any]]],
    batch_a: Any,
    batch_b: Any,
    *,
    trace: Trace | None = None,
) -> tuple[Any, Any]:
    """Run two micro-batches through the same stages, so that one computes while the other communicates.

    A batch runs until it has started a communication; then the other batch runs. The order in which communications
    start depends only on the stages, so it is the same on all ranks. Differentiable if all stages are.

    Parameters
    ----------
    layer_stages : sequence of callables, or of (name, callable)
        stage(state) returns the next state, or an object whose wait() returns it. For several layers, give the stages
        of one layer after those of another.
    batch_a, batch_b : object
        The initial states.
    trace : Trace, optional
        Records the span of every stage.

    Returns
    -------
    (object, object)
        The final states.

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
    """One micro-batch and its position in the stages."""

    def __init__(self, name: str, state: Any, stages: Any, trace: Trace | None) -> None:
        self.state, self._name, self._stages, self._trace = state, name, stages, trace
        self._next = 0
        self._started: tuple[str, Any] | None = None

    @property
    def finished(self) -> bool:
        return self._started is None and self._next == len(self._stages)

    def advance(self) -> None:
        """Wait for the communication under way, then run stages until one starts another communication."""
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
    """Stages of one transformer layer with a moecomm.nn.MoE: attention, dispatch, experts, combine, with residuals.

    Parameters
    ----------
    moe : moecomm.nn.MoE
    attention : callable, optional
        Maps x [T, hidden] to the update that is added to x.

    Returns
    -------
    list of (str, callable)
        Together they map x [T, hidden] to x [T, hidden]. The shared experts run while combine sends the rows back.
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
    """Time spans of this rank: stages, calls on the progress thread, and the roles inside the calls of given buffers.

    A context manager. Stages are torch.profiler.record_function ranges as well, so they appear in profiler traces.

    Parameters
    ----------
    *buffers : Buffer
        Their roles (announce, send, forward, decode pack, ...) are recorded.

    Raises
    ------
    InvalidArgument
        A buffer already records its roles to a file: it was made with record=PATH.
    """

    def __init__(self, *buffers: Buffer) -> None:
        self._buffers = buffers
        self._events: list[tuple[str, str, float, float]] = []

    def __enter__(self) -> Trace:
        for buffer in self._buffers:
            if buffer.backend.recorder is not None:
                raise InvalidArgument(
                    "Trace: a buffer records its roles to a file already; expected a Buffer made without record=",
                    op="Trace",
                )
            buffer.backend.memory.trace(True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._collect()
        for buffer in self._buffers:
            buffer.backend.memory.trace(False)

    def _collect(self) -> None:
        for buffer in self._buffers:
            for native in buffer.backend.memory.natives():
                for role, begin, end in native.take_timeline():
                    self.add("roles", role, begin, end)

    def add(self, track: str, name: str, begin: float, end: float) -> None:
        """Add a span; begin and end are in seconds of time.perf_counter()."""
        self._events.append((track, name, begin, end))

    def add_call(self, name: str, span: tuple[float, float] | None) -> None:
        """Add the span of a call on the progress thread. A call without a span is ignored."""
        if span is not None:
            self.add("progress thread", name, *span)

    def spans(self, track: str | None = None) -> list[tuple[str, str, float, float]]:
        """[(track, name, begin, end)] of one track, or of all, sorted by begin."""
        self._collect()
        return sorted((e for e in self._events if track in (None, e[0])), key=lambda e: e[2])

    def save(self, path: str | os.PathLike[str], comm: Communicator | None = None) -> None:
        """Write Chrome/Perfetto JSON: one process per rank, one thread per track.

        Parameters
        ----------
        path : str or Path
        comm : Communicator, optional
            Makes the call collective: rank 0 writes the spans of all ranks. Only the clocks of ranks on one host
            agree.
        """
        everyone = (
            {0: self.spans()}
            if comm is None
            else dict(enumerate(comm.collective.exchange(self.spans(), "save")))
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


@contextlib.contextmanager
def _range(trace: Trace | None, track: str, name: str) -> Iterator[None]:
    with torch.profiler.record_function(f"moecomm {track} {name}"):
        begin = time.perf_counter()
        try:
            yield
        finally:
            if trace is not None:
                trace.add(track, name, begin, time.perf_counter())
