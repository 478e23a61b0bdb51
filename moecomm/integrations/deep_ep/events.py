"""EventHandle and EventOverlap: events that tell when the results of a call may be used.

On the CPU most calls are complete when they return, so their events are complete, too. On a GPU they run on the current
stream, and an event is a point on that stream. An asynchronous dispatch returns when its counts are known: its rows
arrive on moecomm's thread or stream, and its event waits for them.
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import refuse


class EventHandle:
    """An event of this rank: on a GPU, recorded on the current stream; on the CPU, complete immediately."""

    def __init__(self) -> None:
        self._point = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None

    def current_stream_wait(self) -> None:
        """Let the current stream wait for the event. The host does not wait."""
        if self._point is not None:
            torch.cuda.current_stream().wait_event(self._point)


class CallEvent(EventHandle):
    """The event of a dispatch whose counts are known and whose rows are in flight. It raises the errors of the call."""

    def __init__(self, arrival: Any) -> None:
        self._arrival = arrival

    def current_stream_wait(self) -> None:
        """Let the current stream wait for the rows. On the CPU the host waits."""
        self._arrival.wait()


class EventOverlap:
    """An event, and tensors that must stay alive until it is complete.

    Parameters
    ----------
    event : EventHandle, optional
        None for a synchronous call: there is nothing to wait for.
    extra_tensors : tuple of Tensor, optional
        Kept alive until the event is released.
    """

    def __init__(self, event: Any = None, extra_tensors: Any = None) -> None:
        self.event, self.extra_tensors = event, extra_tensors
        self._hooks: list[Any] = []
        self._release = False

    def current_stream_wait(self, release_handle: Any = False) -> None:
        """Let the current stream wait for the event, then run the registered hooks.

        release_handle releases the event and its tensors.
        """
        if self.event is not None:
            self.event.current_stream_wait()
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook()
        if release_handle:
            self.event = self.extra_tensors = None

    def register_hook_after_wait(self, hook: Any) -> None:
        """Call hook() once, after the next wait."""
        self._hooks.append(hook)

    def __call__(self, release_handle: Any = False) -> EventOverlap:
        """Set release_handle for a with statement: `with event(release_handle=True):`."""
        self._release = bool(release_handle)
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *raised: Any) -> None:
        release, self._release = self._release, False
        self.current_stream_wait(release)


def wait_before(op: str, previous_event: Any, asynchronous: Any, on_comm_stream: Any, names: Any) -> None:
    """Let the current stream wait for the caller's event, before a call begins.

    Parameters
    ----------
    op : str
        Name of the call.
    previous_event : EventOverlap or EventHandle, optional
    asynchronous, on_comm_stream : bool
        The async flag of the call, and allocate_on_comm_stream, which needs the flag and an event, as in deep_ep.
    names : tuple of str
        Names of previous_event and of the async flag in this call, for error texts.

    Raises
    ------
    InvalidArgument
        on_comm_stream is set without the others, or previous_event has the wrong type.
    """
    if on_comm_stream and (previous_event is None or not asynchronous):
        refuse(op, f"allocate_on_comm_stream is set; expected {names[0]} and {names[1]}=True with it")
    if previous_event is None:
        return
    if not isinstance(previous_event, (EventOverlap, EventHandle)):
        refuse(
            op,
            f"{names[0]} is a {type(previous_event).__qualname__}; expected an EventOverlap or an "
            f"EventHandle of this library",
        )
    previous_event.current_stream_wait()


def event_of(asynchronous: Any, *keep: Any, arrival: Any = None) -> EventOverlap:
    """Return the EventOverlap of a call that has just returned. arrival: of rows that may be in flight."""
    if arrival is not None:
        return EventOverlap(CallEvent(arrival), keep)
    return EventOverlap(EventHandle(), keep) if asynchronous else EventOverlap()
