"""Errors of the drop-in's own argument checks end the call on every rank, as those of the library do."""

from __future__ import annotations

from typing import Any

from ...refusals import report


class Reporting:
    """Context of a call's argument checks. An error there is reported to the ranks that are in the same call.

    The peers are in a call of the core Buffer and handle that `at` names, or, before `at` is called, of the core
    Buffer that was used last. If they do something else there, for example make a core Buffer of another shape, the
    report does not reach them, and they wait until their deadline.

    Parameters
    ----------
    world : World
    verb : "dispatch", "combine", "decode_dispatch" or "decode_combine"
        Of the core.
    """

    def __init__(self, world: Any, verb: str) -> None:
        self._verb, self._handle = verb, None
        self._core = world.last.get(verb.startswith("decode"))

    def at(self, core: Any, handle: Any) -> None:
        """Name the core Buffer and its handle."""
        self._core, self._handle = core, handle

    def __enter__(self) -> Reporting:
        return self

    def __exit__(self, kind: Any, error: BaseException, trace: Any) -> None:
        if error is not None and self._core is not None:
            report(self._core.backend, self._verb, self._handle, error)
