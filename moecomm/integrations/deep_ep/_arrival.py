"""Arrival: the rows of an asynchronous dispatch, which may still be in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...results import Dispatched


class Arrival:
    """Of the rows of a dispatch whose counts are known."""

    def __init__(self, pending: Any) -> None:
        self._pending = pending
        self._then: list[Callable[[], None]] = []

    def wait(self) -> None:
        """Wait for the rows, or raise the error of the dispatch. On a GPU the current stream waits, not the host."""
        self._pending.wait()
        then, self._then = self._then, []
        for call in then:
            call()

    def call_after(self, call: Callable[[], None]) -> None:
        """Let the first wait that succeeds call this."""
        self._then.append(call)


def counted(made: Any) -> tuple[Any, Arrival | None]:
    """(Dispatched, Arrival or None) of what a dispatch of the core has returned. Waits for the counts."""
    return (made, None) if isinstance(made, Dispatched) else (made.wait_counts(), Arrival(made))
