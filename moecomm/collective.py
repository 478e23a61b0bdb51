"""Collective steps of constructors: ranks exchange values and make objects, and an error on one is raised on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import errors
from ._bootstrap.encoding import decode, encode
from .call_order import CallOrder
from .checks import in_words
from .errors import ConfigMismatch, MoecommError, PeerLost

_ENDS = 1000  # milliseconds between the end of a process's memory and the end of the process


class Collective:
    """The collective steps of one communicator. They are slow; no dispatch or combine uses them.

    .bootstrap, .native: of the communicator; Communicator sets them.
    """

    def __init__(self, bootstrap: Any, order: CallOrder) -> None:
        self.bootstrap, self._order = bootstrap, order
        self.native: Any = None

    def exchange(self, value: Any, op: str = "exchange") -> list[Any]:
        """Return the values of all ranks by rank; each value as for encoding.encode."""
        self._order.settle()  # an asynchronous call may use the exchange to make memory
        mine = encode([op, value])
        everyone = [decode(data) for data in self.bootstrap.allgather(mine, op)]
        self.require_equal(op, [{"the collective call under way": said} for said, _ in everyone])
        return [value for _, value in everyone]

    def everywhere(self, op: str, step: Callable[[], Any]) -> list[Any]:
        """Run step() on all ranks; return the results by rank. An error on one rank is raised on all ranks.

        Raises
        ------
        MoecommError
        """
        own_rank, cause = self.bootstrap.rank, None
        try:
            mine: tuple[Any, str | None, str | None, int | None] = (step(), None, None, None)
            encode(mine)
        except Exception as error:  # noqa: BLE001 - reported to all ranks, and raised below
            kind = type(error).__name__ if isinstance(error, MoecommError) else None
            named = kind or isinstance(
                error, (RuntimeError, OSError, MemoryError)
            )  # their texts are sufficient
            mine, cause = (
                (
                    None,
                    in_words(error) if named else f"{type(error).__name__}: {in_words(error)}",
                    kind,
                    error.peer if isinstance(error, PeerLost) else None,
                ),
                error,
            )
        except BaseException as error:
            self.bootstrap.interrupt(f"{op}: rank {own_rank} was interrupted by {type(error).__name__}")
            raise
        everyone = self.exchange(mine, op)
        for rank, (_, why, kind, peer) in enumerate(everyone):
            if why is not None:
                known = getattr(errors, kind or "", MoecommError)
                text = (
                    f"{why}{f' (rank {rank})' if len(everyone) > 1 else ''}"
                    if kind
                    else f"{op}: rank {rank} failed: {why}"
                )
                whom = rank if peer is None else peer
                raise known(text, op=op, phase=None if kind else "connect", rank=own_rank, peer=whom) from (
                    cause if rank == own_rank else None
                )
        return [result for result, *_ in everyone]

    def make(self, op: str, make: Callable[[], Any]) -> Any:
        """Run make() on all ranks; return the result of this rank. An error on one rank is raised on all ranks."""
        made = []
        self.everywhere(op, lambda: made.append(make()))
        return made[0]

    def join(self, op: str, make: Callable[[], Any]) -> Any:
        """Run make() on all ranks, and connect the native objects. Return that of this rank."""
        made = []

        def contact() -> Any:
            made.append(make())
            return made[0].contact()

        contacts = self.everywhere(op, contact)
        self.everywhere(op, lambda: self._connect(op, made[0], contacts))
        return made[0]

    def require_equal(self, op: str, everyone: Any) -> None:
        """Raise ConfigMismatch on all ranks if a value differs. everyone: {name: value} of each rank.

        Raises
        ------
        ConfigMismatch
        """
        for name, first in everyone[0].items():
            other = [r for r, values in enumerate(everyone) if values.get(name) != first]
            if other:
                said = {r: everyone[r].get(name) for r in [0, *other]}
                raise ConfigMismatch(
                    f"{op}: {name} differs between ranks: "
                    + ", ".join(f"rank {r} has {v!r}" for r, v in said.items()),
                    op=op,
                    rank=self.bootstrap.rank,
                    peer=other[0],
                    expected=first,
                    got=said[other[0]],
                )

    def _connect(self, op: str, native: Any, contacts: list[Any]) -> None:
        """Connect a native object. The window of a process that has ended cannot be mapped: raise PeerLost."""
        try:
            native.connect(contacts)
        except RuntimeError as error:
            watch = native if hasattr(native, "ended") else self.native
            peer = watch.ended(_ENDS)
            if peer is None:
                raise
            rank = self.bootstrap.rank
            raise PeerLost(
                f"{op} on rank {rank}: rank {peer} is gone: its process has ended",
                op=op,
                phase="connect",
                rank=rank,
                peer=peer,
            ) from error
