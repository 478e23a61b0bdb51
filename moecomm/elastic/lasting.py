"""Lasting: a Communicator that goes on when ranks are lost. It becomes its next generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import contextlib
import json
import threading
import time
import weakref
from dataclasses import dataclass

from .._native import core
from ..env import Environment
from ..errors import InvalidArgument, PeerLost, PeerTimeout, StepInterrupted
from .member import Member, largest_nodes
from .renewed import buffers_of
from .verdict import Verdict, verdict_of

R = TypeVar("R")


@dataclass(frozen=True)
class Recovery:
    """The end of a generation. Times are seconds of time.monotonic().

    .verdict: the result of the agreement. .detected: time of the error on this rank. .agreed: time of the verdict.
    .ready: time from which Communicator and Buffers could be used.
    """

    verdict: Verdict
    detected: float
    agreed: float
    ready: float


class Lasting(Member):
    """The part of Communicator that survives the loss of ranks.

    .generation: number of changes of the members. .members: by rank, its number in the first generation. .recoveries: a
    Recovery for every generation that has ended with a loss.
    """

    recoveries: tuple[Recovery, ...] = ()
    _previous: Callable[[], Any] | None = None  # the last step; another rank may need it again
    _next: Any = None  # the generation that is being made beside this one
    _uids: list[int] | None = None
    _homes: list[int] | None = None  # by rank, its node in the first generation
    _change: Callable[[], None]
    _put_off: tuple[Callable[[], Any], ...] = ()  # work to do after the first step of a generation
    _tidying: threading.Thread | None = None
    _prepared: Any = None  # the native communicator that has prepared the next one

    @property
    def members(self) -> tuple[int, ...]:
        """By rank, its number in the first generation. New ranks have new numbers."""
        return tuple(range(self.size) if self._uids is None else self._uids)

    @property
    def steps(self) -> int:
        """Number of blocks of elastic and steps of retry that are complete here. New ranks continue this number."""
        return self._steps

    @contextlib.contextmanager
    def elastic(self) -> Iterator[None]:
        """Context of collective calls. If a rank is lost in it, it raises StepInterrupted, and the other ranks go on.

        This communicator and its Buffers then become their next generation: fewer ranks, renumbered in the same order.
        Handles and Pendings of the old generation are refused. Buffers with a placement serve lost experts from
        replicas; lost_weight has the weights of experts without one. Buffers without a placement keep the experts of
        the surviving ranks.

        Raises
        ------
        StepInterrupted
            A rank is lost. .verdict is the result of the agreement. The communicator can be used.
        NoMajority, Excluded
            This rank must not go on.
        InvalidArgument
            Ranks are threads of one process, there are more than 128, or they are on GPUs.
        """
        self._require_lasting("elastic")
        try:
            yield
        except (PeerLost, PeerTimeout) as error:
            if self.native.broken() is None and not self.bootstrap.is_broken():
                raise  # a call of an earlier generation, or of another communicator
            verdict = self.recover()
            raise StepInterrupted(
                f"{error.op} on rank {error.rank}: ranks {list(verdict.lost)} are lost, and the step is incomplete; "
                f"ranks {list(verdict.survivors)} go on as generation {self.generation}; repeat the step",
                op=error.op,
                phase=error.phase,
                rank=self.rank,
                peer=error.peer,
                verdict=verdict,
            ) from error
        self._steps += 1
        if self._put_off or self._prepared is not self.native:
            self._tidy()

    def _later(self, work: Callable[[], Any]) -> None:
        """Run work when the first step of the generation is complete."""
        self._put_off = (*self._put_off, work)

    def _tidy(self) -> None:
        """Release the last generation and prepare the next one, in another thread."""
        if self._tidying is not None and self._tidying.is_alive():
            return
        works, self._put_off = self._put_off, ()
        native = self._prepared = self.native

        def tidy() -> None:
            for work in works:
                work()
            with contextlib.suppress(RuntimeError):  # the next generation tries again and reports the error
                native.prepare_next()

        self._tidying = threading.Thread(target=tidy, name="moecomm-tidy")
        self._tidying.start()

    def _finish_tidying(self) -> None:
        """Release all earlier generations."""
        if self._tidying is not None:
            self._tidying.join()
        works, self._put_off = self._put_off, ()
        for work in works:
            work()

    def retry(self, step: Callable[[], R]) -> R:
        """Return step(). If a rank is lost in it, repeat it in the next generation.

        All ranks retry the same steps in the same order. step must give the same result each time, because it may run
        several times, even after it has returned on this rank, if another rank has not completed it. Its calls are
        collective, and at least one of them is a dispatch without a handle.

        Parameters
        ----------
        step : callable
            Kept alive until the next step is complete.

        Raises
        ------
        NoMajority, Excluded, InvalidArgument
            As elastic.
        Exception
            Any error of step() other than PeerLost and PeerTimeout.
        """
        todo = [step]
        while True:
            try:
                self._require_lasting("retry")
                while len(todo) > 1:
                    with self._again():
                        todo[0]()
                    todo.pop(0)
                with self.elastic():
                    result = step()
                self._previous = step
                return result
            except StepInterrupted as interrupted:
                behind = self._steps - interrupted.verdict.steps
                if behind > 1 or (behind and self._previous is None):
                    raise
                todo = [self._previous, step] if behind and self._previous is not None else [step]

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """As elastic, without counting the step again."""
        steps = self._steps
        try:
            with self.elastic():
                yield
        finally:
            self._steps = steps

    def recover(self, *, minority: bool = False, timeout: float | None = None) -> Verdict:
        """Agree on the survivors, and become their communicator. Collective over them. Return the Verdict.

        elastic and retry call it if a rank is lost. The parameters are those of agree.

        Raises
        ------
        NoMajority, Excluded, InvalidArgument
            As agree.
        """
        self._require_lasting("recover")
        self._leave_calls()
        return self._go_on(minority=minority, timeout=timeout)

    def _go_on(self, *, minority: bool = False, timeout: float | None = None) -> Verdict:
        """Agree, and become the next generation: that of the survivors, or the prepared one if all ranks have it."""
        report, detected = self._report(), time.monotonic()
        while True:
            agreed = self.bootstrap.agree(report, go_on=self._is_loss, minority=minority, timeout=timeout)
            verdict, when = verdict_of(agreed, self.size), time.monotonic()
            kept = set.intersection(*(set(said[4]) for said in agreed.values()))
            try:
                if not self._is_loss(agreed):
                    self._change()
                    return verdict
                if self._next is not None:
                    self._next.drop()
                    self._next = None
                report = [self.generation + 1, 0, 0, self._steps, report[4], None]
                self._renew(list(agreed), sorted(kept))
                done = Recovery(verdict, detected, when, time.monotonic())
                self.recoveries = (*self.recoveries, done)
                return verdict
            except (PeerLost, PeerTimeout):  # another rank is lost
                self._leave_calls()
                if report[0] != self.generation:  # in the prepared generation
                    report = self._report()

    def _is_loss(self, agreed: dict[int, list[Any]]) -> bool:
        """Whether ranks are lost. False: the same next generation is ready on all ranks."""
        ready = {json.dumps(said[5]) for said in agreed.values()}
        return len(agreed) < self.size or len(ready) > 1 or ready == {"null"}

    def _require_lasting(self, op: str) -> None:
        self._require_agreeing(op)
        if self.gpu is not None:
            raise InvalidArgument(
                f"{op}: device is 'cuda'; expected a communicator with device='cpu'; use shrink() on GPUs",
                op=op,
                rank=self.rank,
            )

    def _living(self) -> list[Any]:
        return [number for number, renewal in buffers_of(self).items() if renewal.state >= 0]

    def _renew(self, agreed: list[int], kept: list[int]) -> None:
        """Become the communicator of the survivors. agreed: their ranks in the generation that ends."""
        homes = [r // self.ranks_per_node for r in range(self.size)] if self._homes is None else self._homes
        uids = list(self.members)
        self._homes, self._uids = [homes[r] for r in agreed], [uids[r] for r in agreed]
        self.generation += 1
        self.rank, self.size = self.bootstrap.rank, self.bootstrap.size
        self.ranks_per_node = largest_nodes(self._homes)
        self.num_nodes = self.size // self.ranks_per_node
        self.node, self.local_rank = divmod(self.rank, self.ranks_per_node)
        self.rail = "none" if self.num_nodes == 1 else self._rail_between_nodes(Environment().rail)
        old = self.native
        made = lambda: core.Communicator(  # noqa: E731
            self.rank,
            self.size,
            self.ranks_per_node,
            False,
            self.rail,
            self.timeout,
            self.patience == "alive",
            old,
        )
        self._use(self.bootstrap, self.collective.join("elastic", made))
        self.windows: Any = weakref.WeakValueDictionary()
        try:
            renewals = buffers_of(self)
            for number in kept:
                plan = renewals[number].plan(self._uids, self.num_nodes)
                self._later(renewals[number].become(renewals[number].make(self, plan)))
        finally:
            self._later(old.release)
