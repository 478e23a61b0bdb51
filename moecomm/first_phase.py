"""The first phase of an asynchronous dispatch: its counts and shapes are known, and its rows are in flight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import contextlib
import threading

from ._native import core

if TYPE_CHECKING:
    from .results import Dispatched

_SLICE = 100  # milliseconds, after which a waiting thread attends to signals
_here = threading.local()  # .phase: of the call that this thread is in


class FirstPhase:
    """What one thread may ask of a dispatch that another thread runs.

    .native is told by the native call of a cpu world. On a GPU the call returns at the end of this phase, and no thread
    waits here.
    """

    def __init__(self) -> None:
        self.native = core.FirstPhase()
        self._lock = threading.Lock()
        self._made: Dispatched | None = None

    @contextlib.contextmanager
    def of_call(self) -> Iterator[None]:
        """Context of the call, on its thread."""
        _here.phase = self
        try:
            yield
        finally:
            _here.phase = None
            self.native.end()

    def wait(self) -> Dispatched | None:
        """Wait until the counts are known. None: the call has ended, and they were not known before."""
        while True:
            parts = self.native.wait(_SLICE)
            if parts is True:
                return self._made
            if parts:
                make, *made_of = parts
                with self._lock:
                    if self._made is None:
                        self._made = make(*made_of)
                    return self._made

    def finish(self, last: Dispatched) -> Dispatched:
        """Return the result of the call: the object that wait() has returned, if it has.

        A call may have been repeated after that, because another node had too little memory. Then the rows are in
        other memory, and are copied to where the caller expects them.
        """
        with self._lock:
            if self._made is None:
                self._made = last
            else:
                self._made.take(last)
            return self._made


def take_first_phase() -> FirstPhase | None:
    """Return the FirstPhase of the asynchronous dispatch that this thread runs, if any, once."""
    phase, _here.phase = getattr(_here, "phase", None), None
    return phase
