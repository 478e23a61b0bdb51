"""Mesh: the bootstrap of ranks that are processes. Everyone's bytes, with a deadline, over sockets of our own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import threading
import time
import weakref

from .. import errors
from .clock import Clock
from .encoding import decode, encode
from ..errors import ConfigMismatch, InvalidArgument, MoecommError, PeerLost, PeerTimeout
from .sockets import BYE, DONE, FAILED, HELLO, LOST, VALUE, WELCOME, Line, Refused, dial, same, sign

# Up to this many ranks each has a connection to every other one. Above, rank r has them to r +- 1, 2, 4, ...: a value or the news of a death
# that comes on one of them goes on over all others, so everyone learns it while fewer than 2 log2(size) ranks fail at once.
ALL_TO_ALL = 32


def neighbors(rank, size):
    """The ranks that a rank has connections to."""
    if size <= ALL_TO_ALL:
        return [r for r in range(size) if r != rank]
    steps = [1 << i for i in range((size - 1).bit_length())]
    return sorted({(rank + s) % size for s in steps} | {(rank - s) % size for s in steps} - {rank})


def _identity_of(payload):
    """The identity of a failure that a peer tells of."""
    try:
        return str(decode(payload)[3])
    except (MoecommError, TypeError, IndexError, KeyError):
        return None


def _let_go(lines, endpoint):
    for line in lines.values():
        line.end()
    endpoint.leave()


class Mesh:
    """Some ranks that are processes, connected.

    Parameters
    ----------
    endpoint : Endpoint
        Where this rank listens.
    cards : list
        Of all ranks that exchanged theirs.
    ranks : sequence of int
        Which of them belong here; rank r of the mesh is ranks[r].
    me : int
        This rank among all of them.
    timeout : float
        Seconds that any wait may last.
    name : str
        Equal on all its ranks.
    parent : str, optional
        The identity of the mesh that it is a part of.
    numbers : sequence of int, optional
        The ranks in the caller's numbering, by which errors name them until everyone has come.
    exchanges : int
        Exchanges of the parent that this rank has completed: a call of a rank that had begun fewer belongs to an attempt that has ended.
    begun : int
        Exchanges of the parent that this rank has begun.

    Raises
    ------
    PeerTimeout, PeerLost
        A rank has not come, or is gone: .peer of the error.
    ConfigMismatch
        Ranks disagree about who belongs to a part.
    """

    threads, complaint = False, None

    def __init__(
        self, endpoint, cards, ranks, me, timeout, name="all", parent="", numbers=None, exchanges=0, begun=0
    ):
        self._endpoint, self._cards, self._ranks, self._timeout = endpoint, cards, list(ranks), timeout
        self._name, self._parent, self._exchanges, self._begun = name, parent, exchanges, begun
        self.rank, self.size = self._ranks.index(me), len(self._ranks)
        self._numbers = range(self.size) if numbers is None else list(numbers)
        self._neighbors = neighbors(self.rank, self.size)
        self._floods = len(self._neighbors) < self.size - 1
        self._lines = {}  # by neighbor
        self._number = 0  # of the exchange under way or done last
        self._completed = 0  # number of the last exchange that this rank has everyone's bytes of
        self._values = {}  # number -> {rank: bytes} of what has come
        self._lost, self._left = set(), set()  # ranks that are gone; those of them that have said goodbye
        self._done = {}  # number of the last exchange that a neighbor has everything of
        self._told = None  # (number, origin, payload): another rank has failed
        self._failure = None  # the identity of what this mesh has failed by, the same on all ranks
        self._op = "Communicator"
        self._broken = None  # (class, text, peer): what every further exchange says
        self._witness = None  # a line on which a rank waits for this one in another part
        self._busy, self._owner = threading.Lock(), None
        endpoint.enter()
        self._finalizer = weakref.finalize(self, _let_go, self._lines, endpoint)
        try:
            with self._failing(1):
                self._connect()
            nonces = self._allgather(
                secrets.token_bytes(16)
            )  # here everyone has come; and no other mesh has this identity
            self._numbers = range(self.size)
            self._identity = hashlib.sha256(b"".join(nonces)).hexdigest()[:32]
        except BaseException:
            self._finalizer()
            raise

    # -- connecting -------------------------------------------------------------------------------

    def _hello(self, to, refused=None):
        """What this rank says to another one of the mesh when it calls."""
        fields = {
            "name": self._name,
            "parent": self._parent,
            "from": self._ranks[self.rank],
            "to": self._ranks[to],
            "ranks": self._ranks,
            "nonce": secrets.token_hex(16),
            "refused": refused,
            "begun": self._begun,
        }
        return fields, json.dumps({**fields, "signature": sign(self._token_of(to), fields)}).encode()

    def _token_of(self, rank):
        return bytes.fromhex(self._cards[self._ranks[rank]][3])

    def _welcome(self, nonce, caller):
        """The answer to it: proof that the one who answers is who was called."""
        return sign(self._token_of(caller), ["welcome", self._name, nonce])

    def _connect(self):
        """Call every neighbor, be called by it, and keep of the two connections the one that the higher rank has made.

        A call reaches a neighbor that has not come yet as well: the kernel keeps it, and ends it when that process dies.
        """
        calls, nonces, welcomed, callers = {}, {}, set(), {}
        clock, point = Clock(self._timeout), self._endpoint
        try:
            while True:
                for r in self._neighbors:
                    if r not in calls and (line := self._dial(r)) is not None:
                        fields, payload = self._hello(r)
                        calls[r], nonces[r] = line, fields["nonce"]
                        line.put(HELLO, 0, self.rank, payload)
                self._answer(callers)
                for r, line in calls.items():
                    if r in welcomed and r < self.rank:
                        self._read(r, line)  # it may have begun to exchange
                    elif r not in welcomed:
                        line.flush()
                        self._hear(r, line, self._expected_welcome(r, nonces[r]), welcomed)
                for r, (_, line) in callers.items():
                    if r > self.rank:
                        self._read(r, line)
                    elif r not in welcomed:  # a line that ends says nothing: it is the one that is not kept
                        self._told = self._told or next(
                            (
                                (number, r, payload)
                                for kind, number, _, payload in line.frames()
                                if kind == FAILED
                            ),
                            None,
                        )
                self._raise_told(1)
                absent = [r for r in self._neighbors if r not in welcomed or r not in callers]
                if not absent:
                    break
                gone = [r for r in absent if r in self._lost]
                if gone:
                    raise self._lost_error(gone[0])
                self._compare(absent, callers)
                if clock.passed():
                    raise self._late_error(absent)
                with point.lock:
                    fds = point.fileno_list()
                heard = [line for r, line in calls.items() if r < self.rank or r not in welcomed] + [
                    line for r, (_, line) in callers.items() if r > self.rank or r not in welcomed
                ]
                reading = fds + [line.socket.fileno() for line in heard if not line.gone]
                writing = [line.socket.fileno() for line in calls.values() if line.pending]
                if all(r in calls for r in self._neighbors):
                    clock.poll(reading, writing)
                else:
                    time.sleep(0.001)  # a queue of calls is full
            for r in self._neighbors:
                self._lines[r] = calls.pop(r) if r < self.rank else callers.pop(r)[1]
        except BaseException:
            for r, line in [*calls.items(), *((r, line) for r, (_, line) in callers.items())]:
                self._lines[r, line] = line  # the failure is told to all of them
            raise
        for line in [*calls.values(), *(line for _, line in callers.values())]:
            line.close()
        for number, values in (
            self._values.items() if self._floods else ()
        ):  # they came when there was nobody to pass them on to
            for origin, data in values.items():
                self._tell(VALUE, number, origin, data)
        for r in self._lost if self._floods else ():
            self._tell(LOST, 0, r)

    def _dial(self, r):
        try:
            s = dial(self._endpoint.address_in(self._cards[self._ranks[r]]))
        except Refused:
            raise self._lost_error(r) from None
        return None if s is None else Line(s)

    def _answer(self, callers):
        """Welcome those who have called for this mesh."""
        point = self._endpoint
        with point.lock:
            point.greet()
            point.forget(self._parent, self._exchanges)
            for r in self._neighbors:
                queue = point.waiting.get((self._name, self._ranks[r]), [])
                while queue and r not in callers:
                    hello, line = queue.pop(0)
                    if _identity_of(line.failure()) in point.settled:
                        line.close()
                        continue
                    callers[r] = hello, line
                    line.put(WELCOME, 0, self.rank, self._welcome(hello["nonce"], r).encode())
            for name, caller in [
                key for key in point.refusals if key[0] == self._parent and key[1] in self._ranks
            ]:
                queue, r = point.refusals[name, caller], self._ranks.index(caller)
                while queue and r not in callers:
                    number, why, _ = queue.pop(0)
                    if number not in point.settled:
                        self._failure = number
                        raise InvalidArgument(
                            f"{why} (rank {self._numbers[r]})",
                            op=self._op,
                            rank=self._numbers[self.rank],
                            peer=self._numbers[r],
                        )

    def _expected_welcome(self, r, nonce):
        return sign(self._endpoint.token, ["welcome", self._name, nonce])

    def _hear(self, r, line, expected, welcomed):
        for kind, number, _, payload in line.frames(1):
            if kind == WELCOME and same(payload.decode("ascii", "replace"), expected):
                welcomed.add(r)
            elif kind == FAILED:
                self._told = self._told or (number, r, payload)
            else:
                line.close()
        if line.gone and r not in welcomed:
            self._lost.add(r)

    def _compare(self, absent, callers):
        """Refuse to wait for a rank that waits for this one in another part of the same ranks."""
        with self._endpoint.lock:
            for hello, line in self._endpoint.living(self._parent, self._name):
                r = self._ranks.index(hello["from"]) if hello["from"] in self._ranks else None
                if self._parent and r in absent and r not in callers:
                    self._witness = line  # it is told, too
                    raise ConfigMismatch(
                        f"Communicator on rank {self._numbers[self.rank]}: rank {self._numbers[r]} makes a communicator of ranks {hello.get('ranks')} of "
                        f"the first one, this one of {self._ranks}; expected the same on all of them, in the same order of calls",
                        op=self._op,
                        rank=self._numbers[self.rank],
                        peer=self._numbers[r],
                        expected=self._ranks,
                        got=hello.get("ranks"),
                    )

    # -- exchanging -------------------------------------------------------------------------------

    def allgather(self, data, op="bootstrap"):
        """Everyone's bytes by rank; op: the call that needs them, for the messages of errors.

        Raises
        ------
        PeerTimeout, PeerLost, MoecommError
            As the first of its failures was, for good.
        """
        me = threading.get_ident()
        if self._owner == me:
            raise InvalidArgument(
                "a collective call was made from a signal handler that ran inside another one; expected it after that",
                op=op,
                rank=self.rank,
            )
        with self._busy:
            self._owner, self._op = me, op
            try:
                return self._allgather(data)
            finally:
                self._owner = None

    def _allgather(self, data):
        if self._broken is not None:
            self._raise_broken()
        if not self._finalizer.alive:
            raise InvalidArgument("the communicator is closed", op="bootstrap", rank=self.rank)
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
                # A neighbor that has everything does not read any more: what is on its way to it is a copy.
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

    def _tell(self, kind, number, origin, payload=b"", but=None):
        for r, line in self._lines.items():
            if r != but:
                line.put(kind, number, origin, payload)

    def _read(self, r, line):
        """Take what a neighbor has sent, and notice where it ends."""
        for frame in line.frames():
            self._take(r, *frame)
        if line.gone and r not in self._lost:
            self._lose(r, r)

    def _take(self, r, kind, number, origin, payload):
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

    def _lose(self, r, source):
        if r not in self._lost:
            self._lost.add(r)
            if self._floods:
                self._tell(LOST, 0, r, but=source)

    # -- failing ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _failing(self, number):
        """Whatever ends an exchange ends the mesh, and the others are told."""
        try:
            yield
        except OSError as error:
            me = self._numbers[self.rank]
            why = MoecommError(
                f"{self._op} on rank {me}: {error} (a connection to every rank takes a file descriptor: ulimit -n)",
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

    def _fail(self, number, kind, text, peer):
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

    def interrupt(self, why):
        """This rank leaves a collective call in the middle: the others need not wait for it."""
        if self._broken is None and self._finalizer.alive:
            self._fail(self._number + 1, PeerLost, why, self.rank)

    def _raise_broken(self):
        kind, text, peer = self._broken
        raise kind(text, op=self._op, phase="connect", rank=self.rank, peer=peer)

    def _raise_told(self, number):
        """Raise what another rank has failed by, in this exchange or before."""
        if self._told is None or self._told[0] > number:
            return
        _, origin, payload = self._told
        origin = self._numbers[origin]
        kind, text, peer = PeerLost, f"rank {origin} has failed", origin
        me = self._numbers[self.rank]
        with contextlib.suppress(MoecommError, ValueError, TypeError):
            name, text, peer, failure = decode(payload)
            self._failure = str(failure)
            found = getattr(errors, str(name), None)
            kind = found if isinstance(found, type) and issubclass(found, MoecommError) else MoecommError
            peer = peer if isinstance(peer, int) else origin
        if peer == me and kind in (PeerLost, PeerTimeout):
            text = f"{self._op}: the others have given up waiting for this rank: {text}"
        raise kind(
            f"{text} (reported by rank {origin})",
            op=self._op,
            phase="connect",
            rank=me,
            peer=peer,
            reporter=origin,
        )

    def _lost_error(self, r):
        why = (
            "has closed its communicator"
            if r in self._left
            else "is gone: its process has ended, it has given up, or the connection is cut"
        )
        me, r = self._numbers[self.rank], self._numbers[r]
        return PeerLost(
            f"{self._op} on rank {me}: rank {r} {why}", op=self._op, phase="connect", rank=me, peer=r
        )

    def _late_error(self, absent):
        me, absent = self._numbers[self.rank], [self._numbers[r] for r in absent]
        who = (
            f"rank {absent[0]} has"
            if len(absent) == 1
            else f"ranks {', '.join(map(str, absent[:16]))}{' and more' if len(absent) > 16 else ''} have"
        )
        return PeerTimeout(
            f"{self._op} on rank {me}: {who} not come within {self._timeout} s; expected every rank to make the same calls in the same "
            "order (a larger timeout, if it is only slow)",
            op=self._op,
            phase="connect",
            rank=me,
            peer=absent[0],
        )

    # -- parts ------------------------------------------------------------------------------------

    def subset(self, ranks):
        """A mesh of these ranks; collective over them alone. Works where this one is broken."""
        numbers, ranks = list(ranks), [self._ranks[r] for r in ranks]
        name = hashlib.sha256(json.dumps([self._identity, ranks]).encode()).hexdigest()[:32]
        return Mesh(
            self._endpoint,
            self._cards,
            ranks,
            self._ranks[self.rank],
            self._timeout,
            name,
            self._identity,
            numbers,
            self._completed,
            self._number,
        )

    def refuse(self, ranks, why):
        """Tell those ranks that this one makes no part with them."""
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

    def close(self):
        """Close the connections. Local."""
        if self._finalizer.alive:
            self._tell(BYE, 0, self.rank)
            for line in self._lines.values():
                line.end()
            self._finalizer()
