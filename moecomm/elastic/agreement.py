"""Agreement: the surviving ranks reach one verdict, even if further ranks fail during it.

This is a pure state machine: received messages and reported failures go in, messages to send come out. It uses no
socket and no clock, so exploration runs the code of production on random schedules
(tests/support/agreement_schedules.py). docs/elastic.md explains why it is correct, and its limits.
"""

from __future__ import annotations

from typing import Any

PREPARE, PROMISE, REFUSE, ACCEPT, ACCEPTED, DECIDE, STOP = range(7)
Message = tuple[Any, ...]  # kind, number of the ballot, fields of the kind
Mail = list[tuple[int, Message]]  # (receiver, message)


def members(mask: int) -> list[int]:
    """Return the ranks of a set, ascending. A set of ranks is an integer: bit r stands for rank r."""
    return [r for r in range(mask.bit_length()) if mask >> r & 1]


def lowest(mask: int) -> int:
    """Return the lowest rank of a set, or -1 if it is empty."""
    return (mask & -mask).bit_length() - 1


class Agreement:
    """The part of one rank in one agreement.

    The lowest reachable rank leads. It asks all other reachable ranks for a report, makes a verdict from the reports,
    lets the ranks accept it, and announces it. A rank that receives a verdict sends it to all ranks before it goes on.
    If a leader fails, the next one continues with what the ranks have accepted. Ballots are numbered as in Paxos.

    Parameters
    ----------
    rank, size : int
        Rank and size in the generation that has failed.
    report : value
        The contribution of this rank. The verdict has the reports of all survivors.
    minority : bool
        True: the reachable ranks go on even if a larger number may still run elsewhere.

    Attributes
    ----------
    verdict : (set of survivors, {rank: report}) or None
    stopped : bool
        True: this rank must not go on, because it reaches too few ranks.

    Source: L. Lamport, "The Part-Time Parliament", 1998 (single-decree Paxos). The rule of quorums is that of moecomm.
    """

    def __init__(self, rank: int, size: int, report: Any = None, *, minority: bool = False) -> None:
        self.rank, self.size, self.report, self.minority = rank, size, report, minority
        self.all = (1 << size) - 1
        self.dead = 0  # ranks that have certainly ended
        self.lost = 0  # ranks that are unreachable and may still run
        self.verdict: tuple[int, dict[int, Any]] | None = None
        self.stopped = False
        self.promised = -1  # the highest ballot in which this rank takes part
        self.accepted: tuple[int, Any] | None = None  # (ballot, value)
        self.ballot = (
            self.highest
        ) = -1  # the last ballot that this rank has led; the highest ballot in any message
        self.phase = -1  # of .ballot: PREPARE, ACCEPT, or -1 if this rank does not lead
        self.promises: dict[int, tuple[Any, ...]] = {}
        self.accepts = 0

    @property
    def done(self) -> bool:
        """Whether this rank has nothing more to do."""
        return self.verdict is not None or self.stopped

    @property
    def left(self) -> int:
        """The ranks that this rank can still reach, including itself."""
        return self.all & ~self.dead & ~self.lost

    def start(self) -> Mail:
        """Begin. Return the messages to send, as all methods do."""
        return self._lead() if lowest(self.left) == self.rank else []

    def lose(self, rank: int, certain: bool) -> Mail:
        """Note that a rank is lost. certain: its process has ended or has left; else it is unreachable."""
        bit = 1 << rank
        if certain:
            known, self.dead = self.dead & bit, self.dead | bit
        else:
            known, self.lost = (self.dead | self.lost) & bit, self.lost | bit
        if known or self.done or rank == self.rank:
            return []
        if self.phase >= 0:
            return self._advance()
        return self._lead() if lowest(self.left) == self.rank else []

    def late(self) -> Mail:
        """Note that no message came within the timeout: count the ranks that this one waits for as lost."""
        if self.done:
            return []
        if self.phase < 0 and lowest(self.left) == self.rank:
            return self._lead()
        if self.phase < 0:
            return self.lose(lowest(self.left), False)
        out: Mail = []
        for r in members(self._waiting()):
            out += self.lose(r, False)
        return out

    def remind(self) -> Mail:
        """If this rank leads, tell the ranks that wait for it that it still runs. It may wait for a silent rank."""
        return self._to(self.left, (PREPARE, self.ballot)) if self.phase >= 0 else []

    def suspects(self) -> int:
        """The ranks for which this rank waits."""
        if self.done:
            return 0
        return self._waiting() if self.phase >= 0 else self.left & -self.left

    def take(self, sender: int, message: Message) -> Mail:
        """Process a message."""
        kind, ballot = message[0], message[1]
        if kind == STOP:
            return self.lose(sender, True)
        if kind == DECIDE:
            return [] if self.done else self._decide(message[2])
        if self.done:  # the sender may not have received the verdict yet
            again = kind in (PREPARE, ACCEPT) and self.verdict is not None
            return [(sender, (DECIDE, ballot, self._value()))] if again else []
        if ballot > self.highest:
            self.highest = ballot
        if self.dead >> sender & 1:  # it does not lead any more; a promise to it would exclude the new leader
            return []
        if kind == PREPARE:
            if ballot < self.promised:
                return [(sender, (REFUSE, self.promised))]
            self.promised, self.phase = ballot, -1
            return [(sender, (PROMISE, ballot, self.accepted, self.dead, self.lost, self.report))]
        if kind == ACCEPT:
            if ballot < self.promised:
                return [(sender, (REFUSE, self.promised))]
            self.promised, self.accepted = ballot, (ballot, message[2])
            return [(sender, (ACCEPTED, ballot))]
        if kind == REFUSE:
            if self.phase < 0 or ballot < self.ballot:
                return []
            self.phase = -1  # another rank leads; if that rank is dead, this one leads again
            rival = ballot % self.size
            again = rival == self.rank or self.dead >> rival & 1
            return self._lead() if again and lowest(self.left) == self.rank else []
        if ballot != self.ballot or not self.left >> sender & 1:
            return []
        if kind == PROMISE and self.phase == PREPARE:
            self.promises[sender] = message[2:]
            self.dead |= message[3] & ~(1 << self.rank)
            return self._advance()
        if kind == ACCEPTED and self.phase == ACCEPT:
            self.accepts |= 1 << sender
            return self._advance()
        return []

    def is_quorum(self, ranks: int) -> bool:
        """Whether these ranks may decide: no set of other ranks is a quorum too."""
        if ranks & ~self.dead == self.all & ~self.dead:
            return True  # all ranks that may still run
        if self.minority:
            return ranks & self.left == self.left
        twice = 2 * ranks.bit_count()
        return twice > self.size or (twice == self.size and ranks & 1 == 1)

    # -- leading ----------------------------------------------------------------------------------

    def _lead(self) -> Mail:
        self.ballot = (max(self.highest, self.promised, self.ballot) // self.size + 1) * self.size + self.rank
        self.promised, self.phase, self.accepts = self.ballot, PREPARE, 0
        self.promises = {self.rank: (self.accepted, self.dead, self.lost, self.report)}
        return self._to(self.left, (PREPARE, self.ballot)) + self._advance()

    def _waiting(self) -> int:
        if self.phase == ACCEPT:
            return self.left & ~self.accepts
        heard = 0
        for r in self.promises:
            heard |= 1 << r
        return self.left & ~heard

    def _advance(self) -> Mail:
        if self.phase == PREPARE:
            if self._waiting():
                return []
            heard = sum(1 << r for r in self.promises)
            if not self.is_quorum(heard):
                return self._stop()
            value = self._to_accept()
            self.phase, self.accepts, self.accepted = ACCEPT, 1 << self.rank, (self.ballot, value)
            return self._to(self.left, (ACCEPT, self.ballot, value)) + self._advance()
        if self.is_quorum(self.accepts):
            return self._decide(self.accepted[1])  # type: ignore[index]
        return [] if self._waiting() else self._stop()

    def _to_accept(self) -> Any:
        """Return the value that may have been decided already, else a verdict from the reports."""
        before = [p[0] for p in self.promises.values() if p[0] is not None]
        if before:
            return max(before, key=lambda accepted: accepted[0])[1]
        survivors = self.left  # all of them have reported
        for r in members(survivors):  # two survivors that cannot reach each other cannot both go on
            if survivors >> r & 1:
                apart = (self.promises[r][1] | self.promises[r][2]) & survivors & ~(1 << r)
                survivors &= ~(1 << r) if apart & ((1 << r) - 1) else ~apart
        return (survivors, [(r, self.promises[r][3]) for r in members(survivors)])

    # -- ending -----------------------------------------------------------------------------------

    def _value(self) -> Any:
        survivors, reports = self.verdict  # type: ignore[misc]
        return (survivors, list(reports.items()))

    def _decide(self, value: Any) -> Mail:
        survivors, reports = value
        self.verdict, self.phase = (survivors, dict(reports)), -1
        return self._to(self.all & ~self.dead, (DECIDE, self.ballot, (survivors, reports)))

    def _stop(self) -> Mail:
        self.stopped, self.phase = True, -1
        return self._to(self.all & ~self.dead, (STOP, self.ballot))

    def _to(self, ranks: int, message: Message) -> Mail:
        return [(r, message) for r in members(ranks & ~(1 << self.rank))]
