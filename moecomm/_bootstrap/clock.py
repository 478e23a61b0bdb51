"""Clock: the deadline of a wait for sockets."""

from __future__ import annotations

from typing import Any

import select
import time

_POLL = 0.1  # seconds between two looks at the clock
_STOPPED = 1.0  # seconds; a poll that takes longer by this means that this process was stopped, not that a peer is late


class Clock:
    """A deadline. If this process is stopped (SIGSTOP, a debugger), it moves by the length of the stop."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def passed(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self._end

    def poll(self, reading: Any, writing: Any = ()) -> None:
        """Wait until a descriptor is ready, at most 0.1 seconds."""
        poller = select.poll()
        for fd in {*reading, *writing} - {-1}:
            poller.register(
                fd, (select.POLLIN if fd in reading else 0) | (select.POLLOUT if fd in writing else 0)
            )
        began = time.monotonic()
        poller.poll(max(0.0, min(_POLL, self._end - began)) * 1000 + 1)
        late = time.monotonic() - began - _POLL
        if late > _STOPPED:
            self._end += late
