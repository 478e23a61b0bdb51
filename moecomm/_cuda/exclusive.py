"""Exclusive: the calls of one object run one at a time. A call inside another call is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import contextlib
import threading

from ..errors import InvalidArgument


class Exclusive:
    """Runs the calls of one object one at a time, from any thread."""

    _running: str | None
    _put_off: list[Any]

    def __init__(self, rank: int) -> None:
        self._lock, self._running, self._put_off, self._rank = threading.RLock(), None, [], rank

    @contextlib.contextmanager
    def call(self, op: str) -> Iterator[Any]:
        """Context of a call named op. Waits for calls of other threads.

        Raises
        ------
        InvalidArgument
            This thread is inside another call: this code is a signal handler or a finalizer.
        """
        with self._lock:
            if self._running is not None:
                raise InvalidArgument(
                    f"{op}: this thread is inside {self._running} of the same buffer (this code is a signal handler or "
                    f"a finalizer); expected {op} after that call has returned",
                    op=op,
                    rank=self._rank,
                )
            self._running = op
            try:
                yield
            finally:
                self._running = None
                while self._put_off:
                    self._put_off.pop(0)()

    def after_call(self, work: Any) -> None:
        """Run work when no call is running: now, or at the end of the call that this thread is inside."""
        with self._lock:
            if self._running is None:
                work()
            else:
                self._put_off.append(work)
