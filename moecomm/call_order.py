"""The order of a communicator's calls: each waits for earlier asynchronous ones, and is refused after close."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import os
import threading
from concurrent import futures

from .errors import InvalidArgument


class CallOrder:
    """The state of one communicator that every call reads first.

    .ready: it is open, and no asynchronous call is running. .closed: False, or why not, for the error message.
    .rank, .native: of the communicator; Communicator sets them.
    """

    def __init__(self, rank: int) -> None:
        self.ready = True
        self.closed: bool | str = False
        self.rank = rank
        self.native: Any = None
        self._pid = os.getpid()
        self._executor: futures.ThreadPoolExecutor | None = None
        self._progress: int | None = None  # id of the progress thread
        self._last: futures.Future[Any] | None = None

    def close(self, reason: str = "is closed") -> None:
        """Refuse all later calls, for this reason."""
        self.closed, self.ready = reason, False

    def stay_with_parent(self) -> None:
        """Refuse all calls of a forked child. Threads, mappings and connections stay with the parent process."""
        self.close(
            "belongs to the parent process; expected one that this process has made, because a forked child cannot "
            "use it"
        )
        self._executor = self._last = None

    def require_open(self, op: str) -> None:
        """Refuse a call of a closed communicator.

        Raises
        ------
        InvalidArgument
        """
        if self.closed:
            raise InvalidArgument(f"{op}: the communicator {self.closed}", op=op, rank=self.rank)

    def require_here(self, op: str) -> None:
        """Refuse to wait in a forked child for a call of the parent process.

        Raises
        ------
        InvalidArgument
        """
        if self._pid != os.getpid():
            raise InvalidArgument(
                f"{op}: the call belongs to the parent process; a forked child cannot wait for it",
                op=op,
                rank=self.rank,
            )

    def require_outside(self, op: str) -> None:
        """Refuse to wait for a call inside another call, where it could never end.

        Raises
        ------
        InvalidArgument
        """
        self.require_here(op)
        running = "an asynchronous call" if threading.get_ident() == self._progress else self.native.running()
        if running is not None:
            raise InvalidArgument(
                f"{op}: this thread is inside {running} of the same communicator, which waits while this code runs (a "
                f"signal handler, a finalizer); expected {op} after that call has returned",
                op=op,
                rank=self.rank,
            )

    def submit(self, work: Callable[[], Any]) -> futures.Future[Any]:
        """Run work on the progress thread, after earlier work."""

        def note() -> None:
            self._progress = threading.get_ident()

        if self._executor is None:
            self._executor = futures.ThreadPoolExecutor(
                1, thread_name_prefix="moecomm-progress", initializer=note
            )
        self.ready = False
        try:
            self._last = self._executor.submit(work)
        except RuntimeError:  # another thread has closed the communicator
            self.require_open("async_op")
            raise
        return self._last

    def settle(self) -> None:
        """Wait for earlier asynchronous calls, so that calls keep their order.

        Otherwise ranks would match an asynchronous call of one rank with a later call of another.
        """
        last = self._last
        if last is None or threading.get_ident() == self._progress:
            return
        self.require_outside("a call")
        futures.wait([last])
        if self._last is last:
            self._last, self.ready = None, not self.closed

    def end(self) -> None:
        """End the progress thread. Wait for its work, except on that thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=threading.get_ident() != self._progress)
