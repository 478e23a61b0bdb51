"""The agreement's state machine under random schedules, and mutants that the schedules must find."""

import agreement_schedules
import pytest
from agreement_schedules import explore

from moecomm.elastic.agreement import ACCEPT, ACCEPTED, DECIDE, PREPARE, PROMISE, Agreement

SCHEDULES = 100_000


class ForgetsWhatWasAccepted(Agreement):
    def take(self, sender, message):
        if message[0] == PROMISE:
            message = (*message[:2], None, *message[3:])
        return super().take(sender, message)


class AnswersOldBallots(Agreement):
    def take(self, sender, message):
        if message[0] == ACCEPT and self.promised > message[1]:
            self.promised = message[1]
        return super().take(sender, message)


class DoesNotPassOn(Agreement):
    def take(self, sender, message):
        mail = super().take(sender, message)
        return [] if message[0] == DECIDE else mail


class CountsOnlyWhatItReaches(Agreement):
    def is_quorum(self, ranks):
        return True


class TakesTheUnreachableForDead(Agreement):
    def lose(self, rank, certain):
        return super().lose(rank, True)


class LeadsWithAnOldNumber(Agreement):
    def _lead(self):
        self.highest = self.promised = self.ballot = -1
        return super()._lead()


class PromisesToTheDead(Agreement):
    def take(self, sender, message):
        known, self.dead = self.dead, self.dead & ~(1 << sender)
        try:
            return super().take(sender, message)
        finally:
            self.dead |= known


class WaitsForTheDead(Agreement):
    def lose(self, rank, certain):
        self.dead |= (1 << rank) if certain and self.phase < 0 and rank == 0 else 0
        return [] if self.phase == ACCEPT else super().lose(rank, certain)


class CountsTwice(Agreement):
    def take(self, sender, message):
        if message[0] == ACCEPTED and message[1] == self.ballot:
            self.accepts |= 1 << (sender + 1) % self.size
        return super().take(sender, message)


class LosesAReport(Agreement):
    def _decide(self, value):
        survivors, reports = value
        return super()._decide(
            (survivors, reports[:-1] if self.phase == ACCEPT and len(reports) > 2 else reports)
        )


class ExcludesOneTooMany(Agreement):
    def _to_accept(self):
        survivors, reports = super()._to_accept()
        last = survivors.bit_length() - 1
        few = survivors.bit_count() < 3 or last == self.rank
        return (
            (survivors, reports) if few else (survivors & ~(1 << last), [r for r in reports if r[0] != last])
        )


MUTANTS = [
    ForgetsWhatWasAccepted,
    AnswersOldBallots,
    DoesNotPassOn,
    CountsOnlyWhatItReaches,
    TakesTheUnreachableForDead,
    LeadsWithAnOldNumber,
    PromisesToTheDead,
    WaitsForTheDead,
    CountsTwice,
    LosesAReport,
    ExcludesOneTooMany,
]


def test_no_schedule_breaks_it():
    taken, found = explore(SCHEDULES)
    assert found is None
    assert taken > 10 * SCHEDULES, "they are no schedules of any length"


def test_told_to_go_on_every_part_does():
    assert explore(5_000, minority=True)[1] is None


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found(mutant):
    assert explore(40_000, mutant)[1] is not None


def deliver(ranks, silent=()):
    """Run to the end without failures; messages between silent and other ranks are dropped."""
    mail = [(r, to, m) for r, machine in enumerate(ranks) for to, m in machine.start()]
    while mail:
        a, to, message = mail.pop(0)
        if (a in silent) == (to in silent):
            mail += [(to, *more) for more in ranks[to].take(a, message)]
    return mail


def test_the_usual_way():
    ranks = [Agreement(r, 4, {"completed": r}) for r in range(4)]
    for machine in (ranks[0], ranks[2], ranks[3]):
        machine.lose(1, True)
    deliver([ranks[0], Agreement(1, 4), ranks[2], ranks[3]], silent=(1,))
    for machine in (ranks[0], ranks[2], ranks[3]):
        assert machine.verdict == (0b1101, {0: {"completed": 0}, 2: {"completed": 2}, 3: {"completed": 3}})


@pytest.mark.parametrize(
    "size,side,goes_on",
    [(5, (3, 4), False), (5, (0, 1, 4), True), (4, (0, 1), True), (4, (2, 3), False), (3, (2,), False)],
)
def test_a_part_without_a_majority_stops(size, side, goes_on):
    """Of two halves, the one with rank 0 continues."""
    ranks = [Agreement(r, size) for r in range(size)]
    mail = [
        (a, to, m) for a in side for b in range(size) if b not in side for to, m in ranks[a].lose(b, False)
    ]
    mail += [(a, to, m) for a in side for to, m in (ranks[a].start() if a == side[0] and not mail else [])]
    while mail:
        a, to, message = mail.pop(0)
        if to in side:
            mail += [(to, *more) for more in ranks[to].take(a, message)]
    assert {ranks[r].verdict is not None for r in side} == {goes_on}
    assert {ranks[r].stopped for r in side} == {not goes_on}


def test_a_schedule_is_the_same_each_time():
    assert agreement_schedules.run(17) == agreement_schedules.run(17)
    assert PREPARE == 0
