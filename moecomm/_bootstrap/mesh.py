"""Mesh: the bootstrap of ranks that are processes. It exchanges bytes over sockets of moecomm, with a deadline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import contextlib
import hashlib
import json
import secrets
import threading
import weakref

from .. import errors
from .clock import Clock
from .connecting import Connecting
from .encoding import decode, encode
from ..errors import InvalidArgument, MoecommError, PeerLost, PeerTimeout
from .sockets import BYE, DONE, FAILED, HELLO, LOST, VALUE, sign

# In a mesh of at most this size, each rank has a connection to every other one. In a larger mesh, rank r is connected
# to r +- 1, 2, 4, ..., and passes every value and every reported death on to its other neighbors. They reach all ranks
# as long as fewer than 2 log2(size) ranks fail at once.
ALL_TO_ALL = 128


def neighbors(rank: int, size: int) -> Any:
    """Return the ranks to which a rank has connections."""
    if size <= ALL_TO_ALL:
        return [r for r in range(size) if r != rank]
    steps = [1 << i for i in range((size - 1).bit_length())]
    return sorted({(rank + s) % size for s in steps} | {(rank - s) % size for s in steps} - {rank})


def _let_go(lines: Any, endpoint: Any) -> None:
    for line in lines.values():
        line.end()
    endpoint.leave()


class Mesh(Connecting):
    """Connected ranks that are processes. Construction is collective.

    Parameters
    ----------
    endpoint : Endpoint
        The sockets on which this rank listens.
    contacts : list
        Contacts of all ranks that have exchanged them.
    ranks : sequence of int
        Members: rank r of the mesh has contacts[ranks[r]].
    me : int
        Index of this rank in contacts.
    timeout : float
        Limit of every wait in seconds.
    name : str
        Name of the mesh, equal on all its ranks.
    parent : str, optional
        Identity of the mesh of which this one is a part.
    numbers : sequence of int, optional
        The ranks in the caller's numbering. Errors use it until all ranks are connected.
    exchanges : int
        Number of exchanges of the parent that this rank has completed. A rank that calls for a part, and had begun
        fewer exchanges then, belongs to an attempt that has ended.
    begun : int
        Number of exchanges of the parent that this rank has begun.

    Raises
    ------
    PeerTimeout, PeerLost
        A rank does not connect within the timeout, or has ended. .peer names it.
    ConfigMismatch
        Ranks disagree about the members of a part.
    """

    threads = False
    complaint: str | None = None

    def __init__(
        self,
        endpoint: Any,
        contacts: list[Any],
        ranks: Sequence[int],
        me: int,
        timeout: float,
        name: Any = "all",
        parent: str = "",
        numbers: Any = None,
        exchanges: Any = 0,
        begun: Any = 0,
    ) -> None:
        self._endpoint, self._contacts, self._ranks, self._timeout = endpoint, contacts, list(ranks), timeout
        self._name, self._parent, self._exchanges, self._begun = name, parent, exchanges, begun
        self.rank, self.size = self._ranks.index(me), len(self._ranks)
        self._numbers = range(self.size) if numbers is None else list(numbers)
        self._neighbors = neighbors(self.rank, self.size)
        self._floods = len(self._neighbors) < self.size - 1
        self._lines: dict[Any, Any] = {}  # neighbor -> Line
        self._number = 0  # number of the present exchange, or of the last one
        self._completed = 0  # number of the last exchange in which this rank received all bytes
        self._values: dict[Any, Any] = {}  # number of an exchange -> {rank: bytes} received so far
        self._lost: set[int] = set()  # ranks that are gone
        self._left: set[int] = set()  # those of them that closed the mesh
        self._done: dict[
            Any, Any
        ] = {}  # neighbor -> number of the last exchange in which it received all bytes
        self._told: Any = None  # (number, origin, payload) of another rank's failure
        self._failure: str | None = (
            None  # identity of the failure that broke this mesh, the same on all ranks
        )
        self._op = "Communicator"
        self._broken: tuple[Any, str, Any] | None = (
            None  # (class, text, peer) of the error that every later exchange raises
        )
        self._witness: Any = None  # Line of a rank that waits for this one in another part
        self._busy = threading.Lock()
        self._owner: int | None = None
        endpoint.enter()
        self._finalizer = weakref.finalize(self, _let_go, self._lines, endpoint)
        try:
            with self._failing(1):
                self._connect()
            # After this exchange all ranks are connected. Its random bytes make the identity unique.
            nonces = self._allgather(secrets.token_bytes(16))
            self._numbers = range(self.size)
            self._identity = hashlib.sha256(b"".join(nonces)).hexdigest()[:32]
        except BaseException:
            self._finalizer()
            raise

    # -- exchanging -------------------------------------------------------------------------------

    def allgather(self, data: Any, op: str = "bootstrap") -> Any:
        """Return the bytes of all ranks, by rank. op names the call in error messages.

        Raises
        ------
        PeerTimeout, PeerLost, MoecommError
            The exchange has failed, or an earlier one. After a failure, every exchange raises the same error.
        """
        me = threading.get_ident()
        if self._owner == me:
            raise InvalidArgument(
                f"{op}: this code runs inside another collective call (it is a signal handler or a finalizer); "
                f"expected {op} after that call has returned",
                op=op,
                rank=self.rank,
            )
        with self._busy:
            self._owner, self._op = me, op
            try:
                return self._allgather(data)
            finally:
                self._owner = None

    def _allgather(self, data: Any) -> Any:
        if self._broken is not None:
            self._raise_broken()
        if not self._finalizer.alive:
            raise InvalidArgument(f"{self._op}: the communicator is closed", op="bootstrap", rank=self.rank)
        self._number = number = self._number + 1
        clock, said = Clock(self._timeout), False
        with self._failing(number):
            got = self._values.setdefault(number, {})
            got[self.rank] = bytes(data)
            self._tell(VALUE, number, self.rank, data)
            while True:
                for r, line in self._lines.items():
                    line.flush()
                    self._read(r, line)
                self._raise_told(number)
                absent = [r for r in range(self.size) if r not in got]
                if not absent and self._floods and not said:
                    said = True
                    self._tell(DONE, number, self.rank)
                # A neighbor that has received all bytes reads no more: what is queued for it is a copy.
                unread = [
                    r for r, line in self._lines.items() if line.pending and self._done.get(r, 0) < number
                ]
                if not absent and not unread:
                    break
                gone = [r for r in absent if r in self._lost]
                if gone:
                    raise self._lost_error(gone[0])
                if clock.passed():
                    raise self._late_error(absent or unread)
                living = {r: line.socket.fileno() for r, line in self._lines.items() if not line.gone}
                clock.poll(living.values(), [living[r] for r in unread if r in living])
            del self._values[number]
            self._completed = number
        return [got[r] for r in range(self.size)]

    def _tell(self, kind: Any, number: int, origin: int, payload: Any = b"", but: Any = None) -> None:
        for r, line in self._lines.items():
            if r != but:
                line.put(kind, number, origin, payload)

    def _read(self, r: int, line: Any) -> None:
        """Process the frames of a neighbor, and note if its connection has ended."""
        for frame in line.frames():
            self._take(r, *frame)
        if line.gone and r not in self._lost:
            self._lose(r, r)

    def _take(self, r: int, kind: Any, number: int, origin: int, payload: Any) -> None:
        passes_on = False
        if origin >= self.size or (origin != r and not self._floods):
            return
        if kind == VALUE and number >= self._number:
            values = self._values.setdefault(number, {})
            passes_on = origin not in values and number > 0
            values.setdefault(origin, payload)
        elif kind == LOST:
            self._lose(origin, r)
        elif kind == DONE:
            self._done[r] = number
        elif kind == BYE:
            passes_on = origin not in self._left
            self._left.add(origin)
        elif kind == FAILED and self._told is None:
            passes_on = True
            self._told = number, origin, payload
        if passes_on and self._floods:
            self._tell(kind, number, origin, payload, but=r)

    def _lose(self, r: int, source: int) -> None:
        if r not in self._lost:
            self._lost.add(r)
            if self._floods:
                self._tell(LOST, 0, r, but=source)

    # -- failing ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _failing(self, number: int) -> Iterator[Any]:
        """Context in which any error breaks the mesh and is reported to the other ranks."""
        try:
            yield
        except OSError as error:
            me = self._numbers[self.rank]
            why = MoecommError(
                f"{self._op} on rank {me}: {error}; expected a free file descriptor for the connection to every rank "
                "(ulimit -n)",
                op=self._op,
                phase="connect",
                rank=me,
            )
            self._fail(number, MoecommError, str(why), me)
            raise why from error
        except MoecommError as error:
            self._fail(number, type(error), str(error), error.peer)
            raise
        except BaseException as error:
            self._fail(
                number,
                PeerLost,
                f"{self._op}: rank {self._numbers[self.rank]} was interrupted by {type(error).__name__}",
                self._numbers[self.rank],
            )
            raise

    def _fail(self, number: int, kind: Any, text: str, peer: Any) -> None:
        self._broken = kind, text, peer
        self._failure = self._failure or secrets.token_hex(8)
        self._endpoint.settled.add(self._failure)
        payload = encode([kind.__name__, text, peer, self._failure])
        with self._endpoint.lock:
            called = self._endpoint.take(self._name, self._parent)
        for line in [*self._lines.values(), *called, *filter(None, [self._witness])]:
            line.put(FAILED, number, self.rank, payload)
        for line in called:
            line.end()
        self._witness = None

    def interrupt(self, why: str) -> None:
        """Report that this rank leaves a collective call before its end, so that no rank waits for it."""
        if self._broken is None and self._finalizer.alive:
            self._fail(self._number + 1, PeerLost, why, self.rank)

    def _raise_broken(self) -> None:
        assert self._broken is not None
        kind, text, peer = self._broken
        raise kind(text, op=self._op, phase="connect", rank=self.rank, peer=peer)

    def _raise_told(self, number: int) -> None:
        """Raise the failure of another rank, if it reported one in this exchange or an earlier one."""
        if self._told is None or self._told[0] > number:
            return
        _, origin, payload = self._told
        origin = self._numbers[origin]
        kind: type[MoecommError] = PeerLost
        text, peer = f"rank {origin} has failed", origin
        me = self._numbers[self.rank]
        with contextlib.suppress(MoecommError, ValueError, TypeError):
            name, text, peer, failure = decode(payload)
            self._failure = str(failure)
            found = getattr(errors, str(name), None)
            kind = found if isinstance(found, type) and issubclass(found, MoecommError) else MoecommError
            peer = peer if isinstance(peer, int) else origin
        if peer == me and kind in (PeerLost, PeerTimeout):
            text = f"{self._op}: the other ranks have stopped waiting for this rank: {text}"
        raise kind(
            f"{text} (reported by rank {origin})",
            op=self._op,
            phase="connect",
            rank=me,
            peer=peer,
            reporter=origin,
        )

    def _lost_error(self, r: int) -> Any:
        why = (
            "has closed its communicator"
            if r in self._left
            else "is lost: its process has ended, it has stopped waiting, or the connection is broken"
        )
        me, r = self._numbers[self.rank], self._numbers[r]
        return PeerLost(
            f"{self._op} on rank {me}: rank {r} {why}", op=self._op, phase="connect", rank=me, peer=r
        )

    def _late_error(self, absent: Sequence[int]) -> Any:
        me, absent = self._numbers[self.rank], [self._numbers[r] for r in absent]
        who = (
            f"rank {absent[0]} has"
            if len(absent) == 1
            else f"ranks {', '.join(map(str, absent[:16]))}{' and more' if len(absent) > 16 else ''} have"
        )
        return PeerTimeout(
            f"{self._op} on rank {me}: {who} not made this call within {self._timeout} s; expected every rank to make "
            "the same calls in the same order; pass a larger timeout if ranks are slow",
            op=self._op,
            phase="connect",
            rank=me,
            peer=absent[0],
        )

    # -- parts ------------------------------------------------------------------------------------

    def subset(self, ranks: Sequence[int]) -> Any:
        """Return a mesh of these ranks. Collective over them only. This mesh may be broken."""
        numbers, ranks = list(ranks), [self._ranks[r] for r in ranks]
        name = hashlib.sha256(json.dumps([self._identity, ranks]).encode()).hexdigest()[:32]
        return type(self)(
            self._endpoint,
            self._contacts,
            ranks,
            self._ranks[self.rank],
            self._timeout,
            name,
            self._identity,
            numbers,
            self._completed,
            self._number,
        )

    def refuse(self, ranks: Sequence[int], why: str) -> None:
        """Tell these ranks that this rank does not make a part with them."""
        lines, number = [], secrets.token_hex(8)
        for r in ranks:
            with contextlib.suppress(PeerLost):
                if r != self.rank and (line := self._dial(r)) is not None:
                    fields = {
                        "name": self._identity,
                        "parent": self._parent,
                        "from": self._ranks[self.rank],
                        "refused": why,
                        "number": number,
                        "begun": self._number,
                    }
                    line.put(
                        HELLO,
                        0,
                        self.rank,
                        json.dumps({**fields, "signature": sign(self._token_of(r), fields)}).encode(),
                    )
                    lines.append(line)
        clock = Clock(min(1.0, self._timeout))
        while any(line.pending for line in lines) and not clock.passed():
            clock.poll([], [line.socket.fileno() for line in lines if line.pending])
            for line in lines:
                line.flush()
        for line in lines:
            line.close()

    def close(self) -> None:
        """Close the connections. Local."""
        if self._finalizer.alive:
            self._tell(BYE, 0, self.rank)
            for line in self._lines.values():
                line.end()
            self._finalizer()
