"""EventHandle and EventOverlap: when a call's results may be used.

On the CPU a call has ended when it returns, so an event is over as soon as it exists. On a GPU calls run on the current
stream, and an event is a point on it.
"""

from __future__ import annotations

import torch

from .errors import refuse


class EventHandle:
    """A point in the work of this rank: on a GPU recorded on the current stream, on the CPU over at once."""

    def __init__(self):
        self._point = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None

    def current_stream_wait(self):
        """Let the current stream wait for it; the host does not wait."""
        if self._point is not None:
            torch.cuda.current_stream().wait_event(self._point)


class EventOverlap:
    """An event with what must live until it is over.

    Parameters
    ----------
    event : EventHandle, optional
        None: of a synchronous call; there is nothing to wait for.
    extra_tensors : tuple of Tensor, optional
        Kept until the event is waited for and released.
    """

    def __init__(self, event=None, extra_tensors=None):
        self.event, self.extra_tensors = event, extra_tensors
        self._hooks, self._release = [], False

    def current_stream_wait(self, release_handle=False):
        """Let the current stream wait for the event, then run the registered hooks; release_handle drops
        what it keeps.
        """
        if self.event is not None:
            self.event.current_stream_wait()
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook()
        if release_handle:
            self.event = self.extra_tensors = None

    def register_hook_after_wait(self, hook):
        """Call hook() once, behind the next wait."""
        self._hooks.append(hook)

    def __call__(self, release_handle=False):
        """For `with event(release_handle=True):`."""
        self._release = bool(release_handle)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        release, self._release = self._release, False
        self.current_stream_wait(release)


def wait_before(op, previous_event, asynchronous, on_comm_stream, names):
    """What a call does before it begins: the current stream waits for the caller's event.

    Parameters
    ----------
    op : str
    previous_event : EventOverlap or EventHandle, optional
    asynchronous, on_comm_stream : bool
        The call's async flag and allocate_on_comm_stream, which needs the other and an event, as in deep_ep.
    names : tuple of str
        What the call names previous_event and its async flag.

    Raises
    ------
    InvalidArgument
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


def event_of(asynchronous, *keep):
    """The EventOverlap of a call that has just been made."""
    return EventOverlap(EventHandle(), keep) if asynchronous else EventOverlap()
