"""Sockets between ranks: a rank listens at its Endpoint, and a Line is one authenticated connection."""

from __future__ import annotations

from typing import Any

import contextlib
import errno
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import threading
import weakref

from ..env import Environment
from ..errors import InvalidArgument

_open: weakref.WeakSet[Any] = weakref.WeakSet()  # all living Lines and Endpoints; a forked child closes them
_MOST_STRANGERS = (
    4096  # connections that have not sent their first message; the oldest are dropped above this number
)


def network_identity() -> str:
    """Return an identity of the kernel and network namespace: abstract UNIX sockets connect ranks with equal ones."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        return f"{f.read().strip()}/{os.readlink('/proc/self/ns/net')}"


def _address_of(interface: str) -> Any:
    """Return the IP address of a network interface, IPv4 before IPv6, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):
        packed = fcntl.ioctl(s.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        return socket.inet_ntoa(packed[20:24])
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as lines:
        for line in lines:
            digits, _, _, scope, _, name = line.split()
            if name == interface and scope == "00":  # global
                return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
    return None


def _route_to(host: Any) -> Any:
    """Return the source address of packets from this host to another one, or None if there is no route."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as s, contextlib.suppress(OSError):
                s.connect(address)  # connecting a datagram socket sends nothing
                return s.getsockname()[0]
    return None


def own_address() -> Any:
    """Return the IP address at which ranks of other hosts reach this host.

    The interface is the first that exists of: MOECOMM_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; the one
    that routes to MASTER_ADDR; that of the host name; that of the default route.

    Raises
    ------
    InvalidArgument
        The named interface has no address, or this host has only loopback addresses.
    """
    named = Environment().socket_ifname
    if named:
        address = _address_of(named)
        if address is None:
            raise InvalidArgument(
                f"MOECOMM_SOCKET_IFNAME is {named!r}; expected an interface of this host with an IP address (the host "
                f"has {', '.join(n for _, n in socket.if_nameindex())})",
                op="Communicator",
            )
        return address
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        name = os.environ.get(variable, "").split(",")[0].lstrip("=")
        address = _address_of(name) if name and not name.startswith("^") else None
        if address is not None:
            return address
    for host in (
        os.environ.get("MASTER_ADDR"),
        socket.gethostname(),
        "192.0.2.1",
        "2001:db8::1",
    ):  # the last two: the default route
        address = _route_to(host) if host else None
        if address is not None and not address.startswith("127.") and address != "::1":
            return address
    raise InvalidArgument(
        "this host has only loopback addresses, but there are ranks on other hosts; expected an interface that reaches "
        "them; set MOECOMM_SOCKET_IFNAME to its name",
        op="Communicator",
    )


def listen(ip: str | None = None) -> Any:
    """Listen at an abstract UNIX address, or at a free TCP port of an IP address. Return (socket, address)."""
    if ip is None:
        address = "moecomm-" + secrets.token_hex(16)
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        where: Any = "\0" + address
    else:
        s = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM)
        where = (ip, 0)
    try:
        s.bind(where)
        s.listen(4096)  # the kernel lowers this to its limit
        s.setblocking(False)
    except OSError:
        s.close()
        raise
    return s, address if ip is None else list(s.getsockname()[:2])


class Refused(Exception):  # noqa: N818 - a possible result of a connection attempt
    """No process listens at the address."""


def dial(address: Any) -> Any:
    """Start to connect to an address. Return the socket, or None if the caller must try again later.

    Raises
    ------
    Refused
        No process listens at the address.
    """
    unix = isinstance(address, str)
    s = socket.socket(
        socket.AF_UNIX if unix else socket.AF_INET6 if ":" in address[0] else socket.AF_INET,
        socket.SOCK_STREAM,
    )
    s.setblocking(False)
    code = s.connect_ex("\0" + address if unix else tuple(address))
    if not unix:
        _keep_alive(s)
    if code in (0, errno.EINPROGRESS):
        return s
    s.close()
    if code in (errno.EAGAIN, errno.EINTR):
        return None
    raise Refused(os.strerror(code))


def _keep_alive(s: Any) -> None:
    """Detect within half a minute that the host of the peer is gone, even if nothing is sent."""
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        s.setsockopt(socket.IPPROTO_TCP, option, seconds)


# Head of a frame: length of the rest in bytes, kind, number of the exchange, rank of origin.
_HEAD = struct.Struct("<IBQI")
# Kinds: call, answer to a call, bytes of an exchange, all bytes received, rank lost, rank failed, mesh closed,
# agreement.
HELLO, WELCOME, VALUE, DONE, LOST, FAILED, BYE, AGREE = range(8)
LARGEST = 1 << 30  # bytes of a frame
_UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)


class Line:
    """A connected socket that carries frames in both directions and never blocks.

    .gone: the peer has closed the connection or has ended, and everything that it sent has been read. .cut: the peer is
    unreachable, but may still run. .known: the peer has sent its first message.
    """

    def __init__(self, s: Any) -> None:
        s.setblocking(False)
        self.socket, self.gone, self.known, self.cut = s, False, False, False
        self._in, self._out = bytearray(), bytearray()
        if s.family != socket.AF_UNIX:
            _keep_alive(s)
        _open.add(self)

    def put(self, kind: Any, number: int, origin: int, payload: Any = b"") -> None:
        """Queue a frame, and send what the kernel accepts."""
        if not self.gone:
            self._out += _HEAD.pack(_HEAD.size - 4 + len(payload), kind, number, origin) + payload
            self.flush()

    def flush(self) -> None:
        """Send what the kernel accepts."""
        while self._out and not self.gone:
            try:
                del self._out[: self.socket.send(self._out[: 1 << 20], socket.MSG_NOSIGNAL)]
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in (errno.ENOTCONN, errno.EAGAIN):  # not connected yet
                    return
                self._read_all()
                self.gone = True

    @property
    def pending(self) -> int:
        """Number of bytes that are not sent yet."""
        return 0 if self.gone else len(self._out)

    def frames(self, most: int | None = None) -> Any:
        """Return the received frames, at most `most`: [(kind, number, origin, payload)]."""
        self._read_all()
        found: list[Any] = []
        at = 0
        while len(found) != most and len(self._in) - at >= _HEAD.size:
            length, kind, number, origin = _HEAD.unpack_from(self._in, at)
            if not _HEAD.size - 4 <= length <= LARGEST:
                self.gone = True  # the sender is not a rank of moecomm
                break
            if len(self._in) - at < 4 + length:
                break
            found.append((kind, number, origin, bytes(self._in[at + _HEAD.size : at + 4 + length])))
            at += 4 + length
        del self._in[:at]
        return found

    def _read_all(self) -> None:
        while not self.gone:
            try:
                data = self.socket.recv(1 << 20)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    self.gone, self.cut = True, error.errno in _UNREACHABLE
                return
            if not data:
                self.gone = True
            self._in += data

    def close(self) -> None:
        """Close the socket."""
        self.gone = True
        self.socket.close()

    def ended(self) -> Any:
        """Whether the peer is gone or has reported a failure. Received frames stay in the buffer."""
        return self.failure() is not None or self.gone

    def failure(self) -> Any:
        """Return the payload of a received FAILED frame, or None. Received frames stay in the buffer."""
        self._read_all()
        at = 0
        while len(self._in) - at >= _HEAD.size:
            length, kind, _, _ = _HEAD.unpack_from(self._in, at)
            if kind == FAILED:
                return bytes(self._in[at + _HEAD.size : at + 4 + length])
            at += 4 + length
        return None

    def end(self) -> None:
        """Close the connection after the last queued frame. Read first: TCP drops queued data if data is unread."""
        self._read_all()
        self.close()


class Endpoint:
    """The listening sockets of one rank. They stay open as long as a mesh of it lives, and all its meshes use them.

    A connection begins with a HELLO frame: the caller, the name of the mesh, and a signature with the token of the
    called rank. The answer is signed with the token of the caller. The caller's group has exchanged the tokens; they
    are never sent here.

    .waiting: (name of a mesh, caller) -> [(HELLO, Line)] for meshes that this rank is not making yet. .refusals:
    (identity of a mesh, caller) -> [(identity of the failure, text, begun)] of ranks that refused to make a part of it.
    .settled: identities of failures that a call on this rank has raised; later reports of them are ignored.
    """

    def __init__(self) -> None:
        self.network, self.token = network_identity(), secrets.token_bytes(32)
        self.lock = threading.Lock()
        self.users = 0
        self.waiting: dict[Any, Any] = {}
        self.refusals: dict[Any, Any] = {}
        self.settled: set[Any] = set()
        self._over: set[Any] = set()  # names of meshes that will not be made
        self._strangers: list[Any] = []  # Lines without a HELLO so far
        unix, self._unix_address = listen()
        self.listening, self._tcp_address = [unix], None
        _open.add(self)

    def listen_beyond(self, networks: Any) -> None:
        """Also listen on TCP if a rank is in another network namespace.

        Raises
        ------
        InvalidArgument
            As own_address.
        """
        if set(networks) != {self.network}:
            tcp, self._tcp_address = listen(own_address())
            self.listening.append(tcp)

    def contact(self) -> Any:
        """Return [network identity, UNIX address, TCP address, token], which the other ranks need."""
        return [self.network, self._unix_address, self._tcp_address, self.token.hex()]

    def address_in(self, contact: Any) -> Any:
        """Return the address at which this rank reaches the rank with this contact."""
        network, unix, tcp, _ = contact
        return unix if network == self.network else tcp

    def greet(self) -> None:
        """Accept all waiting connections, and read their HELLO frames. The caller holds .lock."""
        for s in self.listening:
            with contextlib.suppress(BlockingIOError, InterruptedError, ConnectionError):
                while True:
                    self._strangers.append(Line(s.accept()[0]))
        for line in list(self._strangers):
            for kind, _, _, payload in line.frames(1):
                if kind == HELLO:
                    self._hello(line, payload)
                else:
                    line.close()
            if line.gone:
                line.close()
        self._strangers = [line for line in self._strangers if not line.gone and not line.known][
            -_MOST_STRANGERS:
        ]

    def _hello(self, line: Any, payload: Any) -> None:
        try:
            hello = json.loads(payload)
            name, caller, refused = str(hello["name"]), int(hello["from"]), hello["refused"]
            begun = hello["begun"] = int(hello.get("begun", 0))  # exchanges of the parent
            genuine = same(hello.pop("signature"), sign(self.token, hello))
        except (ValueError, KeyError, TypeError, AttributeError):
            genuine = False
        if not genuine or name in self._over:
            line.close()
        elif refused is not None:
            self.refusals.setdefault((name, caller), []).append(
                (str(hello.get("number")), str(refused), begun)
            )
            line.close()
        else:
            line.known = True
            self.waiting.setdefault((name, caller), []).append((hello, line))

    def forget(self, parent: str, exchanges: Any) -> None:
        """Drop the calls of ranks that had begun fewer exchanges of the parent than this rank has completed.

        Such a rank has taken part in an exchange since, so its call belongs to an attempt that has ended. The caller
        holds .lock.
        """
        for queue in self.waiting.values():
            for hello, line in list(queue):
                if hello.get("parent") == parent and hello["begun"] < exchanges:
                    queue.remove((hello, line))
                    line.close()
        for (name, _), queue in self.refusals.items():
            queue[:] = [refusal for refusal in queue if name != parent or refusal[2] >= exchanges]

    def end(self, name: Any) -> None:
        """Close all present and future calls for a mesh that will not be made."""
        with self.lock:
            self._over.add(name)
            for line in self.take(name, name):
                line.close()

    def living(self, parent: str, but: Any) -> Any:
        """Return [(HELLO, Line)] of ranks that wait for other parts of a mesh than `but`, and drop ended calls.

        The caller holds .lock.
        """
        found = []
        for (name, _), queue in self.waiting.items():
            for hello, line in list(queue):
                if name == but or hello.get("parent") != parent:
                    continue
                if line.ended():
                    queue.remove((hello, line))
                    line.close()
                else:
                    found.append((hello, line))
        return found

    def take(self, name: Any, parent: str) -> Any:
        """Remove and return the Lines of the calls for a mesh. Drop ended calls for other parts of its parent.

        The caller holds .lock.
        """
        self.greet()
        self.living(parent, name)
        return [
            line
            for key in [key for key in self.waiting if key[0] == name]
            for _, line in self.waiting.pop(key)
        ]

    def fileno_list(self) -> Any:
        """Return the descriptors to poll."""
        return [s.fileno() for s in self.listening] + [line.socket.fileno() for line in self._strangers]

    def enter(self) -> None:
        """Count a mesh that uses the endpoint."""
        self.users += 1

    def leave(self) -> None:
        """Remove a mesh. The last one closes the endpoint."""
        self.users -= 1
        if self.users <= 0:
            self.close()

    def close(self) -> None:
        """Close the listening sockets and all waiting connections."""
        for s in self.listening:
            s.close()
        for line in [*self._strangers, *(line for queue in self.waiting.values() for _, line in queue)]:
            line.close()
        self._strangers, self.waiting = [], {}


def sign(token: bytes, fields: Any) -> Any:
    """Return a signature of the fields. It proves that the sender knows the token."""
    return hmac.new(token, json.dumps(fields, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def same(a: Any, b: Any) -> Any:
    """Whether two signatures are equal, in constant time."""
    return isinstance(a, str) and hmac.compare_digest(a.encode(), b.encode())


def _in_forked_child() -> None:
    """Close the sockets in a forked child. Open copies would hide the end of the parent process from the peers."""
    for thing in list(_open):
        thing.close()


os.register_at_fork(after_in_child=_in_forked_child)
