"""GenerationMesh: a Mesh whose ranks agree on the survivors, which go on over the same connections."""

from __future__ import annotations

from typing import Any

import hashlib
from collections import deque

from ..elastic.agreement import ACCEPT, DECIDE, PROMISE, Agreement, members
from ..errors import Excluded, InvalidArgument, NoMajority, PeerLost
from .clock import Clock
from .encoding import decode, encode
from .mesh import ALL_TO_ALL, Mesh
from .sockets import AGREE

_FLUSH = 1.0  # seconds in which the kernel must accept the verdict
# Messages of a waiting leader in one timeout. Without them, ranks would stop waiting for the leader at the time when it
# stops waiting for a silent rank.
_REMINDERS = 4


def _to_bytes(message: Any) -> Any:
    return encode(list(message))


def _from_bytes(payload: Any) -> Any:
    """Return a message of Agreement. decode returns tuples as lists, so restore them."""
    message = decode(payload)
    if message[0] == PROMISE and message[2] is not None:
        message[2] = (message[2][0], _value(message[2][1]))
    elif message[0] in (ACCEPT, DECIDE):
        message[2] = _value(message[2])
    return tuple(message)


def _value(value: Any) -> Any:
    return value[0], [(r, report) for r, report in value[1]]


class GenerationMesh(Mesh):
    """A Mesh that survives the loss of ranks. Parameters are those of Mesh.

    Agreements are numbered. On every connection, the verdict separates the frames of one generation from those of the
    next: each rank sends the verdict to all others before any frame of the next generation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._agreements = 0  # number of agreements that this rank has completed
        self._letters: Any = deque()  # (rank, payload) of received messages of the present agreement
        self._ahead: set[Any] = set()  # ranks that have sent the verdict of the present agreement
        self._early: list[Any] = []  # frames of these ranks after their verdict
        self._behind: set[Any] = set()  # ranks that have not sent the verdict of the last agreement
        super().__init__(*args, **kwargs)

    def _read(self, r: int, line: Any) -> None:
        for frame in line.frames():
            self._sort(r, *frame)
        if line.gone and r not in self._lost:
            self._lose(r, r)

    def _sort(self, r: int, kind: Any, number: int, origin: int, payload: Any) -> None:
        if r in self._ahead:
            self._early.append((r, kind, number, origin, payload))
        elif kind == AGREE:
            if number == self._agreements and r in self._behind and _from_bytes(payload)[0] == DECIDE:
                self._behind.discard(r)
            elif number == self._agreements + 1:
                self._letters.append((r, payload))
                if _from_bytes(payload)[0] == DECIDE:
                    self._ahead.add(r)
        elif r not in self._behind:
            self._take(r, kind, number, origin, payload)

    def _raise_told(self, number: int) -> None:
        super()._raise_told(number)
        for r in {r for r, _ in self._letters} - set(self._values.get(number, {})):
            raise PeerLost(  # it will not take part in this exchange any more
                f"{self._op} on rank {self.rank}: rank {r} has begun an agreement on the survivors",
                op=self._op,
                phase="connect",
                rank=self.rank,
                reporter=r,
            )

    def require_agreeing(self, op: str) -> None:
        """Refuse a mesh in which some ranks have no connection to each other.

        Raises
        ------
        InvalidArgument
        """
        if self._floods:
            raise InvalidArgument(
                f"{op}: the communicator has {self.size} ranks; expected at most {ALL_TO_ALL}, the largest number with "
                "a connection between every two ranks",
                op=op,
                rank=self.rank,
            )

    @property
    def timeout(self) -> Any:
        """Limit of every wait in seconds."""
        return self._timeout

    def root(self) -> Any:
        """Return (Endpoint, contacts by rank, a unique name), from which a mesh of these and new ranks is made."""
        return self._endpoint, [self._contacts[r] for r in self._ranks], f"{self._identity}/{self._number}"

    def is_broken(self) -> bool:
        """Whether an exchange has failed."""
        return self._broken is not None

    def a_lost_rank(self) -> Any:
        """Return the lowest rank whose connection has ended, or None."""
        return min(self._lost, default=None)

    def agree(
        self, report: Any, *, go_on: Any = False, minority: Any = False, timeout: float | None = None
    ) -> Any:
        """Agree on the survivors. Return {rank of a survivor: its report}, equal on all of them.

        Collective over the survivors. The mesh may be broken.

        Parameters
        ----------
        report : value
            A value that encode accepts.
        go_on : bool or function of the result
            True: the mesh becomes that of the survivors, with new ranks in the same order, over the same connections. A
            function must return the same on all ranks.
        minority : bool
            As for Agreement.
        timeout : float, optional
            Seconds without a message after which a rank counts as lost. None: that of the mesh.

        Raises
        ------
        NoMajority
            Too few ranks are reachable.
        Excluded
            The other ranks go on without this one.
        """
        self.require_agreeing("agree")
        with self._busy:
            self._op = "agree"
            machine = Agreement(self.rank, self.size, [self._number, report], minority=minority)
            self._agree(machine, timeout or self._timeout)
            agreed = self._outcome(machine)
            reports = {r: report for r, (_, report) in agreed.items()}
            self._close_agreement(agreed if (go_on(reports) if callable(go_on) else go_on) else None)
        return reports

    def _agree(self, machine: Any, timeout: float) -> None:
        number = self._agreements + 1
        known: set[Any] = set()
        clock, pause = Clock(timeout), Clock(timeout / _REMINDERS)

        def post(mail: Any) -> None:
            for to, message in mail:
                if to in self._lines:
                    self._lines[to].put(AGREE, number, self.rank, _to_bytes(message))

        def look() -> Any:
            """Process the received messages, and the ranks that were lost."""
            mail = []
            for r, line in self._lines.items():
                line.flush()
                self._read(r, line)
            while self._letters:
                r, payload = self._letters.popleft()
                mail += machine.take(r, _from_bytes(payload))
            for r in self._lost - known:
                known.add(r)
                mail += machine.lose(r, not self._lines[r].cut)
            return mail

        mail = look() + machine.start()
        while True:
            post(mail)
            if machine.done:
                break
            living = [line.socket.fileno() for line in self._lines.values() if not line.gone]
            pending = [
                line.socket.fileno() for line in self._lines.values() if line.pending and not line.gone
            ]
            clock.poll(living, pending)
            mail = look()
            if mail:
                clock = Clock(timeout)
            elif clock.passed():
                mail, clock = machine.late(), Clock(timeout)
            elif pause.passed():
                mail, pause = machine.remind(), Clock(timeout / _REMINDERS)
        clock = Clock(_FLUSH)
        while any(line.pending for line in self._lines.values()) and not clock.passed():
            for line in self._lines.values():
                line.flush()
            clock.poll([], [line.socket.fileno() for line in self._lines.values() if line.pending])

    def _outcome(self, machine: Any) -> Any:
        if machine.stopped:
            out_of_reach = members(machine.all & ~machine.left)
            raise NoMajority(
                f"agree on rank {self.rank}: ranks {out_of_reach} are unreachable and may still run; expected to reach "
                f"more than half of the {self.size} ranks; pass minority=True to go on without a majority",
                op="agree",
                phase="agree",
                rank=self.rank,
                peer=out_of_reach[0] if out_of_reach else None,
            )
        survivors, reports = machine.verdict
        if not survivors >> self.rank & 1:
            raise Excluded(
                f"agree on rank {self.rank}: ranks {members(survivors)} go on without this rank, because some of them "
                "could not reach it; end this process, or join as a new rank",
                op="agree",
                phase="agree",
                rank=self.rank,
                peer=self.rank,
            )
        return {r: reports[r] for r in members(survivors)}

    def _close_agreement(self, agreed: Any) -> None:
        """Begin the next generation with these survivors; None: continue this one."""
        self._agreements += 1
        early, self._early = self._early, []
        new = {r: r for r in range(self.size)} if agreed is None else {r: i for i, r in enumerate(agreed)}
        if agreed is not None:
            self._renumber(list(agreed), new, 1 + max(number for number, _ in agreed.values()))
        self._ahead = set()
        for r, *frame in early:
            if r in new:
                self._sort(new[r], *frame)

    def _renumber(self, survivors: Any, new: Any, number: int) -> None:
        lines = {new[r]: self._lines[r] for r in survivors if r != self.rank}
        for r, line in self._lines.items():
            if r not in new:
                line.end()
        self._lines.clear()
        self._lines.update(lines)  # in place: the finalizer holds this dictionary
        self._ranks = [self._ranks[r] for r in survivors]
        self.rank, self.size = new[self.rank], len(survivors)
        self._numbers, self._neighbors = range(self.size), sorted(lines)
        self._identity = hashlib.sha256(f"{self._identity}/{number}/{survivors}".encode()).hexdigest()[:32]
        self._number = self._completed = number
        self._values, self._done, self._lost, self._left = {}, {}, set(), set()
        self._told = self._failure = self._broken = self._witness = None
        self._letters.clear()
        self._behind = {r for r in lines if survivors[r] not in self._ahead}
