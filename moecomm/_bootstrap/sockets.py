"""Sockets between ranks: where a rank listens, how others reach it, and how both ends know each other."""

from __future__ import annotations

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

_open = weakref.WeakSet()  # every living Line and Endpoint, for a forked child to close
_MOST_STRANGERS = 4096


def network_identity():
    """Equal where abstract UNIX sockets meet: one kernel and one network namespace."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        return f"{f.read().strip()}/{os.readlink('/proc/self/ns/net')}"


def _address_of(interface):
    """The IP address of a network interface, IPv4 before IPv6; None where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):
        packed = fcntl.ioctl(s.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        return socket.inet_ntoa(packed[20:24])
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as lines:
        for line in lines:
            digits, _, _, scope, _, name = line.split()
            if name == interface and scope == "00":  # global
                return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
    return None


def _route_to(host):
    """The address of this host that packets to the other one carry; None where there is no route."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as s, contextlib.suppress(OSError):
                s.connect(address)  # of a datagram socket: nothing is sent
                return s.getsockname()[0]
    return None


def own_address():
    """The one IP address of this host at which ranks of other hosts reach it.

    MOECOMM_SOCKET_IFNAME says the interface, else GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; else it is the one on the way to MASTER_ADDR,
    the one that the host name stands for, or the one of the default route.

    Raises
    ------
    InvalidArgument
        The interface has no address, or there is none besides the loopback.
    """
    named = Environment().socket_ifname
    if named:
        address = _address_of(named)
        if address is None:
            raise InvalidArgument(
                f"MOECOMM_SOCKET_IFNAME: got {named!r}; expected an interface of this host with an IP address (it has "
                f"{', '.join(n for _, n in socket.if_nameindex())})",
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
        "this host has no IP address besides the loopback's, and there are ranks on other hosts; expected MOECOMM_SOCKET_IFNAME=<the "
        "interface that joins the hosts>",
        op="Communicator",
    )


def listen(ip=None):
    """(socket, address): on an abstract UNIX address, or on a free TCP port of one IP address."""
    if ip is None:
        address = "moecomm-" + secrets.token_hex(16)
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        where = "\0" + address
    else:
        s = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM)
        where = (ip, 0)
    try:
        s.bind(where)
        s.listen(4096)  # the kernel takes less where it allows less
        s.setblocking(False)
    except OSError:
        s.close()
        raise
    return s, address if ip is None else list(s.getsockname()[:2])


class Refused(Exception):  # noqa: N818 - not an error: what a connection attempt may find
    """Nobody listens there any more."""


def dial(address):
    """A socket that is being connected, or None: ask again later.

    Raises
    ------
    Refused
        Nobody listens there.
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


def _keep_alive(s):
    """A host that vanishes is noticed within half a minute, even where nothing is sent."""
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        s.setsockopt(socket.IPPROTO_TCP, option, seconds)


_HEAD = struct.Struct(
    "<IBQI"
)  # bytes of the frame behind these four, kind, number of the exchange, rank that it comes from
HELLO, WELCOME, VALUE, DONE, LOST, FAILED, BYE = range(7)
LARGEST = 1 << 30  # bytes of a frame


class Line:
    """One connected socket: frames in both directions, never blocking.

    .gone: the other end has closed it or is dead. What it sent before has been read.
    """

    def __init__(self, s):
        s.setblocking(False)
        self.socket, self.gone, self.known = s, False, False
        self._in, self._out = bytearray(), bytearray()
        if s.family != socket.AF_UNIX:
            _keep_alive(s)
        _open.add(self)

    def put(self, kind, number, origin, payload=b""):
        """Queue a frame and send what the kernel takes."""
        if not self.gone:
            self._out += _HEAD.pack(_HEAD.size - 4 + len(payload), kind, number, origin) + payload
            self.flush()

    def flush(self):
        """Send what the kernel takes."""
        while self._out and not self.gone:
            try:
                del self._out[: self.socket.send(self._out[: 1 << 20], socket.MSG_NOSIGNAL)]
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in (errno.ENOTCONN, errno.EAGAIN):  # the connection is still being made
                    return
                self._read_all()
                self.gone = True

    @property
    def pending(self):
        """Bytes that wait to be sent."""
        return 0 if self.gone else len(self._out)

    def frames(self, most=None):
        """[(kind, number, origin, payload)] of all that has come, or of the first few."""
        self._read_all()
        found, at = [], 0
        while len(found) != most and len(self._in) - at >= _HEAD.size:
            length, kind, number, origin = _HEAD.unpack_from(self._in, at)
            if not _HEAD.size - 4 <= length <= LARGEST:
                self.gone = True  # no peer of ours
                break
            if len(self._in) - at < 4 + length:
                break
            found.append((kind, number, origin, bytes(self._in[at + _HEAD.size : at + 4 + length])))
            at += 4 + length
        del self._in[:at]
        return found

    def _read_all(self):
        while not self.gone:
            try:
                data = self.socket.recv(1 << 20)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    self.gone = True
                return
            if not data:
                self.gone = True
            self._in += data

    def close(self):
        """Close the socket."""
        self.gone = True
        self.socket.close()

    def ended(self):
        """Whether the other end is gone or has sent that it failed; keeps what it has sent."""
        return self.failure() is not None or self.gone

    def failure(self):
        """The payload of FAILED, where it has come; keeps what has been sent."""
        self._read_all()
        at = 0
        while len(self._in) - at >= _HEAD.size:
            length, kind, _, _ = _HEAD.unpack_from(self._in, at)
            if kind == FAILED:
                return bytes(self._in[at + _HEAD.size : at + 4 + length])
            at += 4 + length
        return None

    def end(self):
        """Close it behind what was put last. What was not read would make TCP drop that."""
        self._read_all()
        self.close()


class Endpoint:
    """Where one rank listens, for as long as a communicator of it lives: further communicators of the same ranks connect here, too.

    A connection begins with a hello: who it is, for which communicator, and a signature with the token of the rank that it goes to. The answer is
    signed with the token of the one that called. Tokens went through the caller's group; they never travel here.
    """

    def __init__(self):
        self.network, self.token = network_identity(), secrets.token_bytes(32)
        self.lock = threading.Lock()
        self.users = 0
        self.waiting = {}  # (name of a mesh, caller) -> [(its hello, Line)]: for a mesh that is not being made here yet
        self.refusals = {}  # (identity of a mesh, caller) -> [(identity of the failure, text, begun)]: that rank has refused to make a part of it
        self.settled = (
            set()
        )  # identities of the failures that a call here has raised: news of them that comes later is no news
        self._strangers = []  # lines that have not said hello
        unix, self._unix_address = listen()
        self.listening, self._tcp_address = [unix], None
        _open.add(self)

    def listen_beyond(self, networks):
        """Listen on TCP too, where ranks are elsewhere.

        Raises
        ------
        InvalidArgument
            As own_address.
        """
        if set(networks) != {self.network}:
            tcp, self._tcp_address = listen(own_address())
            self.listening.append(tcp)

    def card(self):
        """What the other ranks need to know: network identity, addresses and token."""
        return [self.network, self._unix_address, self._tcp_address, self.token.hex()]

    def address_in(self, card):
        """Where this rank reaches the one of that card."""
        network, unix, tcp, _ = card
        return unix if network == self.network else tcp

    def greet(self):
        """Take every connection that waits, and every hello that has come. The caller holds .lock."""
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

    def _hello(self, line, payload):
        try:
            hello = json.loads(payload)
            name, caller, refused = str(hello["name"]), int(hello["from"]), hello["refused"]
            begun = hello["begun"] = int(hello.get("begun", 0))  # exchanges of the parent
            genuine = same(hello.pop("signature"), sign(self.token, hello))
        except (ValueError, KeyError, TypeError, AttributeError):
            genuine = False
        if not genuine:
            line.close()
        elif refused is not None:
            self.refusals.setdefault((name, caller), []).append(
                (str(hello.get("number")), str(refused), begun)
            )
            line.close()
        else:
            line.known = True
            self.waiting.setdefault((name, caller), []).append((hello, line))

    def forget(self, parent, exchanges):
        """Drop the calls of ranks that had begun fewer exchanges of the parent than this rank has completed. The caller holds .lock.

        Such a rank has taken part in an exchange since, so the attempt to which its call belongs has ended.
        """
        for queue in self.waiting.values():
            for hello, line in list(queue):
                if hello.get("parent") == parent and hello["begun"] < exchanges:
                    queue.remove((hello, line))
                    line.close()
        for (name, _), queue in self.refusals.items():
            queue[:] = [refusal for refusal in queue if name != parent or refusal[2] >= exchanges]

    def living(self, parent, but):
        """[(hello, Line)] of those who wait for other parts of a mesh than `but`; who has given up is forgotten. The caller holds .lock."""
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

    def take(self, name, parent):
        """The lines of all who have called for a mesh so far; drops those that failed to make another part of its parent. The caller holds .lock."""
        self.greet()
        self.living(parent, name)
        return [
            line
            for key in [key for key in self.waiting if key[0] == name]
            for _, line in self.waiting.pop(key)
        ]

    def fileno_list(self):
        """Descriptors on which something may come."""
        return [s.fileno() for s in self.listening] + [line.socket.fileno() for line in self._strangers]

    def enter(self):
        """One more mesh uses it."""
        self.users += 1

    def leave(self):
        """One mesh less; the last one closes it."""
        self.users -= 1
        if self.users <= 0:
            self.close()

    def close(self):
        """Listen no more."""
        for s in self.listening:
            s.close()
        for line in [*self._strangers, *(line for queue in self.waiting.values() for _, line in queue)]:
            line.close()
        self._strangers, self.waiting = [], {}


def sign(token, fields):
    """Proof that one knows the token."""
    return hmac.new(token, json.dumps(fields, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def same(a, b):
    """Whether two signatures are equal, in constant time."""
    return isinstance(a, str) and hmac.compare_digest(a.encode(), b.encode())


def _in_forked_child():
    """A child that kept the sockets would hide the death of its parent from the peers."""
    for thing in list(_open):
        thing.close()


os.register_at_fork(after_in_child=_in_forked_child)
