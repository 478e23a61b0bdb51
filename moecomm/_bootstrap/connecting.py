"""Connecting: the part of Mesh that makes its connections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import json
import secrets
import time

from .clock import Clock
from .encoding import decode
from ..errors import ConfigMismatch, InvalidArgument, MoecommError
from .sockets import FAILED, HELLO, LOST, VALUE, WELCOME, Line, Refused, dial, same, sign


def _identity_of(payload: Any) -> str | None:
    """Return the identity of a failure from a peer's report, or None."""
    try:
        return str(decode(payload)[3])
    except (MoecommError, TypeError, IndexError, KeyError):
        return None


class Connecting:
    """The part of Mesh that connects its neighbors. Expects the attributes of Mesh, and its methods for failures."""

    rank: int
    _name: str
    _parent: str
    _op: str
    _ranks: list[int]
    _numbers: Any
    _neighbors: list[int]
    _contacts: list[Any]
    _endpoint: Any
    _timeout: float
    _begun: int
    _exchanges: int
    _floods: bool
    _lines: dict[Any, Any]
    _values: dict[Any, Any]
    _lost: set[int]
    _told: Any
    _read: Callable[..., Any]
    _tell: Callable[..., Any]
    _raise_told: Callable[..., Any]
    _lost_error: Callable[..., Any]
    _late_error: Callable[..., Any]

    def _hello(self, to: Any, refused: Any = None) -> Any:
        """Return (fields, payload) of the message with which this rank calls another one."""
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

    def _token_of(self, rank: int) -> Any:
        return bytes.fromhex(self._contacts[self._ranks[rank]][3])

    def _welcome(self, nonce: bytes, caller: Any) -> Any:
        """Return the answer to a call. It proves that this rank is the one that was called."""
        return sign(self._token_of(caller), ["welcome", self._name, nonce])

    def _connect(self) -> None:
        """Call every neighbor and accept its call. Of the two connections, keep the one that the higher rank has made.

        A neighbor need not be in this function yet: the kernel queues the call, and ends it if that process dies.
        """
        calls: dict[int, Any] = {}
        nonces: dict[int, Any] = {}
        welcomed: set[int] = set()
        callers: dict[Any, Any] = {}
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
                        self._read(r, line)  # the peer may have begun to exchange
                    elif r not in welcomed:
                        line.flush()
                        self._hear(r, line, self._expected_welcome(r, nonces[r]), welcomed)
                for r, (_, line) in callers.items():
                    if r > self.rank:
                        self._read(r, line)
                    elif r not in welcomed:  # the end of this line means nothing: it is not kept
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
                    time.sleep(0.001)  # the queue of a neighbor is full
            for r in self._neighbors:
                self._lines[r] = calls.pop(r) if r < self.rank else callers.pop(r)[1]
        except BaseException:
            for r, line in [*calls.items(), *((r, line) for r, (_, line) in callers.items())]:
                self._lines[r, line] = line  # the failure is reported on all of them
            raise
        for line in [*calls.values(), *(line for _, line in callers.values())]:
            line.close()
        if self._floods:  # pass on what came before the lines existed
            for number, values in self._values.items():
                for origin, data in values.items():
                    self._tell(VALUE, number, origin, data)
            for r in self._lost:
                self._tell(LOST, 0, r)

    def _dial(self, r: int) -> Any:
        try:
            s = dial(self._endpoint.address_in(self._contacts[self._ranks[r]]))
        except Refused:
            raise self._lost_error(r) from None
        return None if s is None else Line(s)

    def _answer(self, callers: Any) -> None:
        """Answer the ranks that have called for this mesh."""
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

    def _expected_welcome(self, r: int, nonce: bytes) -> Any:
        return sign(self._endpoint.token, ["welcome", self._name, nonce])

    def _hear(self, r: int, line: Any, expected: Any, welcomed: Any) -> None:
        for kind, number, _, payload in line.frames(1):
            if kind == WELCOME and same(payload.decode("ascii", "replace"), expected):
                welcomed.add(r)
            elif kind == FAILED:
                self._told = self._told or (number, r, payload)
            else:
                line.close()
        if line.gone and r not in welcomed:
            self._lost.add(r)

    def _compare(self, absent: Sequence[int], callers: Any) -> None:
        """Refuse to wait for a rank that waits for this one in another part of the parent."""
        with self._endpoint.lock:
            for hello, line in self._endpoint.living(self._parent, self._name):
                r = self._ranks.index(hello["from"]) if hello["from"] in self._ranks else None
                if self._parent and r in absent and r not in callers:
                    self._witness = line  # the failure is reported on it too
                    raise ConfigMismatch(
                        f"Communicator on rank {self._numbers[self.rank]}: ranks are {self._ranks} here, but "
                        f"{hello.get('ranks')} on rank {self._numbers[r]} (in the numbers of the first communicator); "
                        "expected the same ranks on all of them, and calls in the same order",
                        op=self._op,
                        rank=self._numbers[self.rank],
                        peer=self._numbers[r],
                        expected=self._ranks,
                        got=hello.get("ranks"),
                    )
