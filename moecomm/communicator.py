"""Communicator: the ranks, the nodes they form, and how the nodes are joined."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numbers
import os
import socket
import threading
import weakref
from concurrent import futures

import torch

from ._bootstrap import bootstrap

from ._cuda import cuda

from . import errors
from ._native import core
from ._version import __version__
from ._bootstrap.encoding import decode, encode
from .env import Environment
from .errors import ConfigMismatch, InvalidArgument, MoecommError, raise_failure
from .shapes import as_int
from .shared import Shared


def _host_identity() -> str:
    """Ranks with equal identity can share memory: one kernel, one view of its network, and process numbers that mean the same process."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        boot = f.read().strip()
    return "/".join(
        [boot, socket.gethostname(), *(os.readlink(f"/proc/self/ns/{space}") for space in ("net", "pid"))]
    )


def _in_words(error: Any) -> str:
    """What an error says, where it can say anything: its arguments may be objects that cannot be printed."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - whatever a foreign __str__ raises
        return "an error that cannot be printed"


_LONGEST, _USUAL = 10_000_000, 30.0  # seconds
_living: weakref.WeakSet[Communicator] = weakref.WeakSet()


def _in_forked_child() -> None:
    """Threads, mappings and connections stay with the parent: what a child inherits is of no use to it."""
    for comm in _living:
        comm._closed, comm._ready = "the parent process's; a forked child cannot use it", False
        comm._executor = comm._last = None


os.register_at_fork(after_in_child=_in_forked_child)


def _is_timeout(timeout: Any) -> bool:
    return isinstance(timeout, numbers.Real) and 0 < timeout <= _LONGEST  # type: ignore[operator]


def require_timeout(timeout: Any, op: str) -> None:
    """Refuse what is no number of seconds.

    Raises
    ------
    InvalidArgument
    """
    if not _is_timeout(timeout):
        raise InvalidArgument(
            f"timeout: got {timeout!r}; expected seconds > 0, at most {_LONGEST} (every wait ends)", op=op
        )


def as_device(device: Any, op: str) -> torch.device:
    """The torch.device that is meant.

    Raises
    ------
    InvalidArgument
        There is no such device.
    """
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise InvalidArgument(f"device: got {device!r}; expected cpu or cuda", op=op) from None


def _device_of(device: Any) -> torch.device:
    """The torch.device of a rank; refuses what is no device, or not one of this machine."""
    device = as_device(device, "Communicator")
    if device.type == "cuda":
        cuda.require("Communicator")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.type != "cpu":
        raise InvalidArgument(f"device: got {device}; expected cpu or cuda", op="Communicator")
    return device


class Communicator(Shared):
    """The world of ranks that dispatch and combine move tokens in.

    Parameters
    ----------
    group : torch ProcessGroup, one-dimensional DeviceMesh, mpi4py Comm, "alone" or None
        None: torch.distributed's default group where it is initialized; else what the launcher says in the environment (torchrun, or RANK, WORLD_SIZE,
        MASTER_ADDR and MASTER_PORT; mpirun; srun); else one rank alone. Sources that contradict each other, and being alone in what looks like a
        launched job, are errors: pass the group then, or set MOECOMM_GROUP. "alone": one rank, whatever the environment says. Torch groups and MPI
        are used once, to exchange addresses; what comes later (barrier, buffers, duplicate, shrink, migrations) needs neither.
    ranks_per_node : int, optional
        Consecutive ranks that share memory. None: the ranks that are on one host.
    device : str or torch.device, optional
        "cpu", or "cuda" (the current GPU, or the one named; it may differ between ranks, and several may share one). Processes
        of one host share memory by CUDA IPC; those of several hosts, and where MOECOMM_CUDA_FABRIC=nccl, by NCCL.
    timeout : float
        Seconds that any wait may last.

    Raises
    ------
    InvalidArgument
        An argument or a MOECOMM_* variable is wrong, on whichever rank: raised on all of them, and the message names it. The
        ranks do not divide into nodes of ranks_per_node, or a node spans hosts (or pid namespaces); the cuda world cannot be used
        here, or not between these hosts: the message names NCCL's version and what is expected. The environment contradicts itself.
    ConfigMismatch
        Ranks disagree about ranks_per_node, device, timeout, MOECOMM_RAIL or the version of moecomm.
    PeerTimeout, PeerLost
        A rank has not come within the timeout, or is gone: .peer of the error.

    Source: the two networks and the rail of DeepSeek-V3, technical report, section 3.2.2.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        ranks_per_node: int | None = None,
        device: torch.device | str | None = None,
        timeout: float = 30.0,
    ) -> None:
        ranks_per_node = as_int(ranks_per_node)
        # A rank whose arguments are wrong takes part in the first round all the same: the others learn it there.
        self._bootstrap = boot = bootstrap.find(group, timeout if _is_timeout(timeout) else _USUAL)
        self.rank, self.size = boot.rank, boot.size
        self._native: Any = None
        self._closed: bool | str = False
        self._pid = os.getpid()
        # Of asynchronous calls: the thread, its number, the last call.
        self._executor: futures.ThreadPoolExecutor | None = None
        self._progress: int | None = None
        self._last: futures.Future[Any] | None = None
        self._ready = True  # open, and no asynchronous call is under way

        def arguments() -> Any:
            if boot.complaint is not None:
                raise boot.complaint
            require_timeout(timeout, "Communicator")
            if not isinstance(ranks_per_node, (int, type(None))):
                raise InvalidArgument(
                    f"ranks_per_node: got {ranks_per_node!r}; expected a divisor of the {self.size} ranks",
                    op="Communicator",
                    rank=self.rank,
                )
            self.device, self.timeout = _device_of(device), float(timeout)
            same = {
                "version": __version__,
                "ranks_per_node": ranks_per_node,
                "device": self.device.type,
                "timeout": self.timeout,
            }
            return (
                same,
                {"MOECOMM_RAIL": self._rail_between_nodes(Environment().rail)},
                None if boot.threads else _host_identity(),
            )

        try:
            self._join_world(arguments, ranks_per_node)
        except BaseException:
            boot.close()  # where this fails nobody has it
            raise

    def _join_world(self, arguments: Any, ranks_per_node: Any) -> None:
        boot = self._bootstrap
        everyone, rails, hosts = zip(*self._everywhere("Communicator", arguments), strict=True)
        self._require_equal("Communicator", everyone)
        self.ranks_per_node = self._node_size(ranks_per_node, hosts)
        self.num_nodes = self.size // self.ranks_per_node
        self.node, self.local_rank = divmod(self.rank, self.ranks_per_node)
        # In the cuda world: see moecomm/cuda.py.
        self._stream, self._latest = None, (None, None)
        self._buffers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._gpu = (
            self.device.index if self.device.type == "cuda" else None
        )  # its number; None: the cpu world
        if self.num_nodes == 1:
            self.rail = "none"
        elif self._gpu is not None:
            self.rail = "loopback"  # unless the reach, below, knows better
        else:
            self._require_equal("Communicator", rails)
            self.rail = rails[0]["MOECOMM_RAIL"]
            if self.rail == "loopback" and not boot.threads:
                raise InvalidArgument(
                    "MOECOMM_RAIL: got 'loopback'; processes need ucx between nodes",
                    op="Communicator",
                    rank=self.rank,
                )
        self._native = self._join(
            "Communicator",
            lambda: core.Communicator(
                self.rank,
                self.size,
                self.ranks_per_node,
                boot.threads,
                self.rail if self._gpu is None else "none",
                self.timeout,
            ),
        )
        self._reach = None if self._gpu is None else cuda.reach_of(self, hosts)  # of its windows on GPUs
        if self._reach is not None and self.num_nodes > 1 and self._reach.rail != "memory":
            self.rail = self._reach.rail
        _living.add(self)

    def _exchange(self, value: Any, op: str = "exchange") -> list[Any]:
        """Everyone's value by rank, as encoding.encode takes it. Collective."""
        mine = encode([op, value])
        everyone = [decode(data) for data in self._bootstrap.allgather(mine, op)]
        self._require_equal(op, [{"the collective call under way": said} for said, _ in everyone])
        return [value for _, value in everyone]

    def _rail_between_nodes(self, wanted: str) -> str:
        return wanted if wanted != "auto" else "loopback" if self._bootstrap.threads else "ucx"

    def _everywhere(self, op: str, step: Any) -> list[Any]:
        """step() of every rank, by rank. Where it fails on one, an error on all of them says where and why."""
        cause = None
        try:
            mine: tuple[Any, str | None, str | None] = (step(), None, None)
            encode(mine)
        except Exception as error:  # noqa: BLE001 - told to everyone, and raised below
            kind = type(error).__name__ if isinstance(error, MoecommError) else None
            named = kind or isinstance(error, (RuntimeError, OSError, MemoryError))  # whose texts say enough
            mine, cause = (
                (None, _in_words(error) if named else f"{type(error).__name__}: {_in_words(error)}", kind),
                error,
            )
        except BaseException as error:
            self._bootstrap.interrupt(f"{op}: rank {self.rank} was interrupted by {type(error).__name__}")
            raise
        everyone = self._exchange(mine, op)
        for rank, (_, why, kind) in enumerate(everyone):
            if why is not None:
                known = getattr(errors, kind or "", MoecommError)
                text = (
                    f"{why}{f' (rank {rank})' if self.size > 1 else ''}"
                    if kind
                    else f"{op}: rank {rank} failed: {why}"
                )
                raise known(text, op=op, phase=None if kind else "connect", rank=self.rank, peer=rank) from (
                    cause if rank == self.rank else None
                )
        return [result for result, _, _ in everyone]

    def _make_everywhere(self, op: str, make: Any) -> Any:
        """make() on every rank; this rank's result. Where it fails on one, an error on all of them says where and why."""
        made = []
        self._everywhere(op, lambda: made.append(make()))
        return made[0]

    def _join(self, op: str, make: Any) -> Any:
        """make() an object on every rank and connect them."""
        made = []

        def card() -> Any:
            made.append(make())
            return made[0].card()

        cards = self._everywhere(op, card)
        self._everywhere(op, lambda: made[0].connect(cards))
        return made[0]

    def _require_equal(self, op: str, everyone: Any) -> None:
        """Raise ConfigMismatch on every rank when a value differs on any."""
        for name, first in everyone[0].items():
            other = [r for r, values in enumerate(everyone) if values.get(name) != first]
            if other:
                said = {r: everyone[r].get(name) for r in [0, *other]}
                raise ConfigMismatch(
                    f"{op}: {name} differs between ranks: "
                    + ", ".join(f"rank {r} has {v!r}" for r, v in said.items()),
                    op=op,
                    rank=self.rank,
                    peer=other[0],
                    expected=first,
                    got=said[other[0]],
                )

    def _node_size(self, wanted: int | None, hosts: Any) -> int:
        if wanted is None:
            if hosts[0] is None:
                return self.size
            runs = [hosts.count(h) for h in dict.fromkeys(hosts)]
            consecutive = all(
                hosts[i] == hosts[i - 1] or hosts[i] not in hosts[:i] for i in range(1, self.size)
            )
            if len(set(runs)) > 1 or not consecutive:
                raise InvalidArgument(
                    f"ranks_per_node: hosts hold {runs} ranks; expected equally many consecutive ranks on every host",
                    op="Communicator",
                    rank=self.rank,
                )
            return runs[0]
        if not isinstance(wanted, int) or wanted < 1 or self.size % wanted:
            raise InvalidArgument(
                f"ranks_per_node: got {wanted!r}; expected a divisor of the {self.size} ranks",
                op="Communicator",
                rank=self.rank,
            )
        for first in range(0, self.size, wanted):
            if len(set(hosts[first : first + wanted])) > 1:
                raise InvalidArgument(
                    f"ranks_per_node: got {wanted}, but ranks {first}..{first + wanted - 1} are on different hosts",
                    op="Communicator",
                    rank=self.rank,
                )
        return wanted

    def _require_open(self, op: str) -> None:
        if self._closed:
            raise InvalidArgument(f"{op}: the communicator is {self._closed}", op=op, rank=self.rank)

    def _submit(self, work: Any) -> Any:
        """Run work on this communicator's progress thread, after what was submitted before."""

        def note() -> None:
            self._progress = threading.get_ident()

        if self._executor is None:
            self._executor = futures.ThreadPoolExecutor(
                1, thread_name_prefix="moecomm-progress", initializer=note
            )
        self._ready = False
        try:
            self._last = self._executor.submit(work)
        except RuntimeError:  # another thread has closed the communicator meanwhile
            self._require_open("async_op")
            raise
        return self._last

    def _require_here(self, op: str) -> None:
        if self._pid != os.getpid():
            raise InvalidArgument(
                f"{op}: the call is the parent process's; a forked child cannot wait for it",
                op=op,
                rank=self.rank,
            )

    def _require_outside(self, op: str) -> None:
        """Refuse to wait for a call where it cannot come to its end meanwhile."""
        self._require_here(op)
        running = (
            "an asynchronous call" if threading.get_ident() == self._progress else self._native.running()
        )
        if running is not None:
            raise InvalidArgument(
                f"{op}: this thread is inside {running} of the same communicator, in whose middle this code runs (a signal handler, a "
                f"finalizer); expected {op} after that call has returned",
                op=op,
                rank=self.rank,
            )

    def _settle(self) -> None:
        """Let what was submitted come to its end. Calls happen in the order in which they were made, or ranks would pair
        one rank's asynchronous call with another rank's next one."""
        last = self._last
        if last is None or threading.get_ident() == self._progress:
            return
        self._require_outside("a call")
        futures.wait([last])
        if self._last is last:
            self._last, self._ready = None, not self._closed

    def _abort(self, rank: int) -> None:
        """From any thread: what waits for peers on the host ends, since this rank has failed."""
        self._native.abort(rank)
        if self._reach is not None:
            self._reach.abort()

    def barrier(self) -> None:
        """Wait until every rank has come here.

        Raises
        ------
        PeerTimeout, PeerLost
            A rank does not come.
        """
        self._require_open("barrier")
        broken = self._native.broken()
        if broken is not None:
            raise_failure(broken, op="barrier", rank=self.rank)
        self._exchange(None, "barrier")

    def duplicate(self) -> Communicator:
        """A communicator of the same ranks whose calls need not be in order with this one's. Collective.

        Raises
        ------
        PeerTimeout, PeerLost
            A rank does not come.
        """
        self._require_open("duplicate")
        return self._of(range(self.size), self.ranks_per_node)

    def shrink(self, alive: Iterable[int]) -> Communicator:
        """A communicator of the ranks that are left, numbered anew in ascending order. Collective over them alone.

        Works where this communicator is broken. Nodes are as large as the survivors allow: all of one size, and none across
        two old ones; ranks of a node that lost one may each become a node of their own.

        Parameters
        ----------
        alive : iterable of int
            Ranks of this communicator, the same on all of them and with the caller's among them.

        Raises
        ------
        InvalidArgument
            alive names ranks that do not exist, or not this one.
        PeerTimeout, PeerLost
            One of them does not come either.
        """
        self._require_open("shrink")
        try:
            left = [as_int(r) for r in alive]
            fits = all(isinstance(r, int) and 0 <= r < self.size for r in left) and self.rank in left
        except TypeError:
            left, fits = [], False
        if not fits:  # the others come with a list of their own, and wait for this rank
            why = f"shrink: alive is {_in_words(left or alive)}; expected ranks in 0..{self.size - 1} with {self.rank} among them"
            self._bootstrap.refuse(range(self.size), why)
            raise InvalidArgument(why, op="shrink", rank=self.rank)
        alive = sorted(set(left))
        nodes = [r // self.ranks_per_node for r in alive]
        per_node = max(
            n
            for n in range(1, len(alive) + 1)
            if len(alive) % n == 0 and all(len(set(nodes[i : i + n])) == 1 for i in range(0, len(alive), n))
        )
        return self._of(alive, per_node)

    def _of(self, ranks: Iterable[int], per_node: int) -> Communicator:
        return Communicator(
            self._bootstrap.subset(ranks),
            ranks_per_node=per_node,
            device=self.device if self._gpu is None else torch.device("cuda", self._gpu),
            timeout=self.timeout,
        )

    def _on_host(self) -> Communicator:
        """The same ranks in the cpu world. Collective."""
        return Communicator(
            self._bootstrap.subset(range(self.size)), ranks_per_node=self.ranks_per_node, timeout=self.timeout
        )

    def close(self) -> None:
        """Release what this communicator holds. Local, may be called twice.

        Waits for a call that another thread has under way, which its timeout bounds. From within a call of this thread (a signal handler
        or a finalizer runs while it waits): when that call has returned.
        """
        if self._closed:
            return
        self._closed, self._ready = "closed", False
        if not self._native.after_call(self._release):
            self._release()

    def _release(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=threading.get_ident() != self._progress)
        self._native.release()
        self._bootstrap.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Communicator(rank={self.rank}, size={self.size}, nodes={self.num_nodes}x{self.ranks_per_node}, rail={self.rail!r})"
