"""Joining: a new rank calls a member of a mesh at its address, and the members invite it to a larger mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import base64
import hashlib
import json
import secrets
import time

from ..errors import InvalidArgument, PeerLost, PeerTimeout
from .clock import Clock
from .encoding import decode, encode
from .generations import GenerationMesh
from .sockets import HELLO, VALUE, Endpoint, Line, Refused, dial, sign

_SCHEME, _NAME = "moecomm:", "join"
_MOST = 8  # ranks in an address; one of them must still run when it is used
_FLUSH = 5.0  # seconds in which the kernel must accept an invitation


def address_of(contacts: list[Any]) -> Any:
    """Return the contacts of some ranks as text."""
    return _SCHEME + base64.urlsafe_b64encode(json.dumps(contacts[:_MOST]).encode()).decode()


def _contacts_of(address: Any) -> Any:
    try:
        contacts = json.loads(base64.urlsafe_b64decode(address[len(_SCHEME) :]))
        known = all(isinstance(contact[0], str) and bytes.fromhex(contact[3]) for contact in contacts)
        if address.startswith(_SCHEME) and contacts and known:
            return contacts
    except (ValueError, TypeError, AttributeError, IndexError):
        pass
    raise InvalidArgument(
        f"join: address is {str(address)[:80]!r}; expected Communicator.address of a member",
        op="join",
    )


class Waiting:
    """The new ranks that wait at the endpoint of this rank."""

    def __init__(self, endpoint: Any) -> None:
        self._endpoint = endpoint
        self._lines: dict[int, Any] = {}  # number -> (HELLO, Line)

    def contacts(self) -> Any:
        """Return [{"id", "contact", "host"}] of the ranks that still wait."""
        with self._endpoint.lock:
            self._endpoint.greet()
            for key in [key for key in self._endpoint.waiting if key[0] == _NAME]:
                for hello, line in self._endpoint.waiting.pop(key):
                    self._lines[key[1]] = hello, line
        for number, (_, line) in list(self._lines.items()):
            if line.ended():
                line.close()
                del self._lines[number]
        return [
            {"id": number, "contact": hello["contact"], "host": hello["host"]}
            for number, (hello, _) in self._lines.items()
        ]

    def invite(self, joiner: Any, told: Any) -> None:
        """Invite a new rank, if it waits here. Ranks that wait elsewhere are invited there."""
        if joiner["id"] not in self._lines:
            return
        line = self._lines.pop(joiner["id"])[1]
        line.put(VALUE, 0, 0, encode(told))
        clock = Clock(_FLUSH)
        while line.pending and not clock.passed():
            clock.poll([], [line.socket.fileno()])
            line.flush()
        line.end()

    def close(self) -> None:
        """Close the connections of ranks that still wait. They try the other ranks of their address."""
        for _, line in self._lines.values():
            line.close()
        self._lines.clear()


class Wider:
    """A mesh that is going to be made, of connected ranks and new ones.

    Parameters
    ----------
    endpoint : Endpoint
    contacts : list
        Contacts by rank of the new mesh.
    me : int
        The rank of this process in the new mesh.
    timeout : float
    name : str
        Unique name of the new mesh, equal on all its ranks.
    """

    def __init__(self, endpoint: Any, contacts: list[Any], me: int, timeout: float, name: Any) -> None:
        self._endpoint, self._contacts, self._me, self._timeout, self._name = (
            endpoint,
            contacts,
            me,
            timeout,
            name,
        )

    def invitation(self, rank: int) -> Any:
        """Return the part of an invitation that describes the new mesh."""
        return {"contacts": self._contacts, "me": rank, "name": self._name}

    def connect_once(self) -> Any:
        """As connect, for an endpoint that no other mesh uses."""
        try:
            return self.connect()
        finally:
            self._endpoint.leave()

    def connect(self) -> Any:
        """Make the GenerationMesh. Collective over its ranks.

        Raises
        ------
        PeerTimeout, PeerLost
            A rank does not make the call within the timeout, or has ended.
        """
        ranks = range(len(self._contacts))
        try:
            return GenerationMesh(
                self._endpoint, self._contacts, ranks, self._me, self._timeout, self._name, self._name
            )
        except BaseException:
            self._endpoint.end(self._name)  # closes later calls too, for example of a rank that was stopped
            raise


def wider(mesh: Any, ranks: Sequence[int], contacts: list[Any]) -> Any:
    """Return the Wider of a GenerationMesh.

    ranks: its ranks in the new order; -1: a new rank, whose contact is in contacts.
    """
    endpoint, own, name = mesh.root()
    everyone = [own[r] if r >= 0 else contact for r, contact in zip(ranks, contacts, strict=True)]
    name = hashlib.sha256(json.dumps([name, everyone]).encode()).hexdigest()[:32]
    return Wider(endpoint, everyone, list(ranks).index(mesh.rank), mesh.timeout, name)


def dial_in(address: Any, timeout: float, host: Any) -> Any:
    """Call a member at the address and wait for its invitation. Return (invitation, Wider).

    Raises
    ------
    InvalidArgument
        The address is invalid, or the members are on another host and do not listen on TCP.
    PeerLost, PeerTimeout
        The members have ended, or do not invite this rank within the timeout.
    """
    contacts, point = _contacts_of(address), Endpoint()
    point.enter()
    try:
        clock = Clock(timeout)
        lost: PeerLost | None = None
        for contact in contacts:
            try:
                told = _ask(point, contact, host, clock, timeout)
                return told, Wider(point, told["contacts"], told["me"], told["timeout"], told["name"])
            except PeerLost as error:
                lost = error
        assert lost is not None  # there is at least one contact
        raise lost
    except BaseException:
        point.leave()
        raise


def _ask(point: Any, contact: Any, host: Any, clock: Any, timeout: float) -> Any:
    where = point.address_in(contact)
    if where is None:
        raise InvalidArgument(
            "join: address belongs to another host, whose ranks accept connections of their own host only; expected "
            "the address of a rank on this host, or of members on several hosts",
            op="join",
        )
    point.listen_beyond([contact[0]])
    line = _call(where)
    fields = {
        "name": _NAME,
        "from": secrets.randbits(31),
        "contact": point.contact(),
        "host": host,
        "refused": None,
        "begun": 0,
    }
    signed = {**fields, "signature": sign(bytes.fromhex(contact[3]), fields)}
    line.put(HELLO, 0, 0, json.dumps(signed).encode())
    try:
        return _wait(line, clock, timeout)
    finally:
        line.close()


def _call(where: Any) -> Any:
    while True:
        try:
            s = dial(where)
        except Refused:
            raise PeerLost(
                "join: the ranks at the address have ended; expected Communicator.address of a running member",
                op="join",
                phase="connect",
            ) from None
        if s is not None:
            return Line(s)
        time.sleep(0.01)


def _wait(line: Any, clock: Any, timeout: float) -> Any:
    while not clock.passed():
        line.flush()
        for kind, _, _, payload in line.frames(1):
            if kind == VALUE:
                return decode(payload)
        if line.gone:
            raise PeerLost(
                "join: the ranks at the address have ended; expected Communicator.address of a running member",
                op="join",
                phase="connect",
            )
        clock.poll([line.socket.fileno()], [line.socket.fileno()] if line.pending else [])
    raise PeerTimeout(
        f"join: the members have not admitted this rank within {timeout} s; expected all of them to call admit, and "
        "enough new ranks to form nodes of equal size",
        op="join",
        phase="connect",
    )
