"""Bootstraps: how ranks find each other and exchange bytes before they share memory.

A bootstrap serves constructors, barriers and the migration of experts. It is never on the data path.

Sockets. Every rank that is a process listens on a UNIX socket with a random name in the abstract namespace, which every
process of the same network namespace can reach. If ranks are in several network namespaces (hosts), each rank also
listens on a TCP port that the kernel chooses, bound to one IP address. The address is the first that exists of: the
interface in MOECOMM_SOCKET_IFNAME; that in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; the interface that routes to
MASTER_ADDR; the address of the host name; the interface of the default route. The sockets are open from Communicator()
until the last communicator made from it is closed.

Authentication. Every rank has a random token of 32 bytes. A caller signs its first message (HMAC-SHA256) with the token
of the rank that it calls. The answer is signed with the token of the caller. Tokens travel once, through the caller's
group (the store of a torch group, MPI, or the store at MASTER_ADDR); a process that can read them can join. Later
messages are neither encrypted nor signed: the TCP network must be trusted. They are JSON and are checked when they are
read; nothing in them is executed.

Rank 0 also holds a torch TCPStore at MASTER_PORT, on every interface and without authentication, if the world is found
by RANK and WORLD_SIZE (or by the variables of Slurm), the default group of torch is not initialized, and no agent of
torchrun holds a store. UCX and NCCL open ports of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import os
import threading
import time

from . import groups, launch
from ..errors import InvalidArgument, PeerLost, PeerTimeout
from .mesh import Mesh


class Alone:
    """The bootstrap of a single rank."""

    rank, size, threads = 0, 1, False
    complaint: str | None = None

    def allgather(self, data: Any, op: str = "bootstrap") -> Any:  # noqa: ARG002 - no other rank can be late
        """Return the bytes of all ranks, by rank."""
        return [data]

    def subset(self, ranks: Sequence[int]) -> Any:  # noqa: ARG002 - there is one rank
        """Return a bootstrap of these ranks. Collective over them only."""
        return Alone()

    def is_broken(self) -> bool:
        """Return False: there is no other rank to lose."""
        return False

    def a_lost_rank(self) -> None:
        """Return None: there is no other rank to lose."""

    def agree(
        self, report: Any, *, go_on: Any = False, minority: Any = False, timeout: float | None = None
    ) -> Any:  # noqa: ARG002 - there is one rank
        """Return {rank: its report}, as GenerationMesh.agree."""
        return {0: report}

    def refuse(self, ranks: Sequence[int], why: str) -> None:
        """Do nothing: there is no other rank."""

    def interrupt(self, why: str) -> None:
        """Do nothing: there is no other rank."""

    def close(self) -> None:
        """Do nothing: there are no connections."""


class ThreadWorld:
    """The state that the rank threads of one run_local share."""

    def __init__(self, size: int, timeout: float, whole: Any = None, numbers: Any = None) -> None:
        self.size, self.timeout = size, timeout
        self.whole, self.numbers = (
            whole or self,
            numbers or range(size),
        )  # the world of run_local, and its ranks
        self.ended: set[Any] = set()  # ranks whose function has returned or raised; of the whole world
        self.barrier = threading.Barrier(size)
        self.contacts = [None] * size
        self.failed: int | None = None  # rank whose function raised first
        self.kept: list[Any] = []  # windows, which stay mapped until every rank thread has ended
        self.changed = threading.Condition()
        self.parts: dict[Any, Any] = {}  # name of a part -> ThreadWorld of some of the ranks
        self.arrived: dict[Any, Any] = {}  # name of a part -> ranks that have called subset for it
        self.refusals: dict[Any, Any] = {}  # rank -> texts of its refusals to make a part


class Thread:
    """The bootstrap of one rank thread of run_local."""

    threads = True
    complaint: str | None = None

    def __init__(self, world: Any, rank: int) -> None:
        self._world, self.rank, self.size = world, rank, world.size
        self._subsets: dict[Any, Any] = {}  # ranks of a part -> number of times that this rank has made it
        self._heard: dict[Any, Any] = {}  # rank -> number of its refusals that this rank has raised

    def keep(self, owner: Any) -> None:
        """Keep an owner of memory alive until all rank threads have ended: they reach it by pointer."""
        self._world.kept.append(owner)

    def allgather(self, data: Any, op: str = "bootstrap") -> Any:
        """Return the bytes of all ranks, by rank. op names the call in error messages."""
        self._world.contacts[self.rank] = data
        self._meet(op)
        out = list(self._world.contacts)
        self._meet(op)
        return out

    def subset(self, ranks: Sequence[int]) -> Any:
        """Return a bootstrap of these ranks. Collective over them only."""
        world, ranks = self._world, tuple(ranks)
        self._subsets[ranks] = self._subsets.get(ranks, 0) + 1
        name = ranks, self._subsets[ranks]
        deadline = time.monotonic() + world.timeout
        with world.changed:
            numbers = [world.numbers[r] for r in ranks]
            part = world.parts.setdefault(name, ThreadWorld(len(ranks), world.timeout, world.whole, numbers))
            come = world.arrived.setdefault(name, set())
            come.add(self.rank)
            world.changed.notify_all()
            while len(come) < len(ranks):
                for r in ranks:
                    told, known = world.refusals.get(r, []), self._heard.get(r, 0)
                    if r not in come and len(told) > known:
                        self._heard[r] = len(told)
                        raise InvalidArgument(
                            f"{told[known]} (rank {r})", op="Communicator", rank=self.rank, peer=r
                        )
                if world.failed is not None:
                    raise PeerLost(
                        f"bootstrap on rank {self.rank}: rank {world.failed} has ended with an exception",
                        op="bootstrap",
                        rank=self.rank,
                        peer=world.failed,
                    )
                left = deadline - time.monotonic()
                if left <= 0:
                    absent = [r for r in ranks if r not in come]
                    raise PeerTimeout(
                        f"bootstrap on rank {self.rank}: ranks {absent} have not made the same call within "
                        f"{world.timeout} s",
                        op="bootstrap",
                        rank=self.rank,
                        peer=absent[0],
                    )
                world.changed.wait(min(left, 0.1))
        return Thread(part, ranks.index(self.rank))

    def refuse(self, ranks: Sequence[int], why: str) -> None:  # noqa: ARG002 - its peers read the refusal
        """Tell these ranks that this rank does not make a part with them."""
        with self._world.changed:
            self._world.refusals.setdefault(self.rank, []).append(why)
            self._world.changed.notify_all()

    def has_ended(self, rank: int, seconds: float) -> Any:
        """Whether a rank thread has left its function, or does so meanwhile: nothing of it runs any more."""
        whole, number = self._world.whole, self._world.numbers[rank]
        with whole.changed:
            return whole.changed.wait_for(lambda: number in whole.ended, seconds)

    def interrupt(self, why: str) -> None:
        """Do nothing: the exception of this rank thread ends the waits of the others."""

    def _meet(self, op: str) -> None:
        try:
            self._world.barrier.wait(self._world.timeout)
        except threading.BrokenBarrierError:
            failed = self._world.failed
            if failed is not None:
                raise PeerLost(
                    f"{op} on rank {self.rank}: rank {failed} has ended with an exception",
                    op=op,
                    rank=self.rank,
                    peer=failed,
                ) from None
            raise PeerTimeout(
                f"{op} on rank {self.rank}: not every rank made the call within {self._world.timeout} s",
                op=op,
                rank=self.rank,
            ) from None

    def close(self) -> None:
        """Do nothing: there are no connections."""


def find(group: Any, timeout: float) -> Any:
    """Return the bootstrap of a group. None: the group that the environment describes.

    .complaint of the result is None, or the InvalidArgument that this rank must raise as soon as it can report it to
    the other ranks.

    Parameters
    ----------
    group : torch ProcessGroup, one-dimensional DeviceMesh, mpi4py Comm, "alone" or None
    timeout : float

    Raises
    ------
    InvalidArgument
        The group has an unknown type. The environment is incomplete or contradictory.
    PeerTimeout, PeerLost
        A rank did not make the call within the timeout, or has ended.
    """
    if group is None:
        return _from_environment(timeout)
    if isinstance(group, (Alone, Mesh, Thread)):
        return group
    if isinstance(group, str) and group == "alone":
        return Alone()
    kind = type(group).__module__
    if kind.startswith("mpi4py") and hasattr(group, "Get_rank"):
        return _joined(groups.Mpi(group, timeout), timeout)
    if kind.startswith("torch"):
        import torch.distributed as dist

        if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
            if group.ndim != 1:
                raise InvalidArgument(
                    f"group is a DeviceMesh of {group.ndim} dimensions "
                    f"{group.mesh_dim_names or tuple(group.shape)}; expected one dimension, that of the ranks among "
                    'which experts are distributed; pass one of its dimensions, for example mesh["ep"]',
                    op="Communicator",
                )
            group = group.get_group()
        if isinstance(group, dist.ProcessGroup):
            return _joined(groups.of_torch(group, timeout), timeout)
    if isinstance(group, int) and _is_no_member(group):
        raise InvalidArgument(
            "group is GroupMember.NON_GROUP_MEMBER of torch: this process is not a member of the group; expected only "
            "members to make its Communicator",
            op="Communicator",
        )
    raise InvalidArgument(
        f"group is a {type(group).__qualname__}; expected a torch ProcessGroup, a one-dimensional DeviceMesh, "
        'an mpi4py Comm, "alone" or None',
        op="Communicator",
    )


def _is_no_member(group: Any) -> Any:
    import torch.distributed as dist

    return dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER


def _joined(group: Any, timeout: float) -> Any:
    return Alone() if group.size == 1 else groups.connect(group, timeout)


def _from_environment(timeout: float) -> Any:
    import torch.distributed as dist

    # An invalid value is refused with the other variables, on every rank.
    choice = os.environ.get("MOECOMM_GROUP", "auto")
    if choice == "alone":
        return Alone()
    if choice in ("auto", "torch") and dist.is_available() and dist.is_initialized():
        boot = _joined(groups.of_torch(dist.group.WORLD, timeout), timeout)
        if choice == "auto":
            try:
                torch = launch.Claim(
                    "torch", "torch.distributed's default group, which is initialized,", boot.rank, boot.size
                )
                launch.require_agreement([torch, *launch.claims()])
            except InvalidArgument as error:
                boot.complaint = error
        return boot
    if choice == "torch":
        raise InvalidArgument(
            "MOECOMM_GROUP is 'torch', but the default group of torch.distributed is not initialized; call "
            "init_process_group() before Communicator()",
            op="Communicator",
        )
    said = launch.claims() if choice in ("auto", "env", "mpi") else [c for c in [launch.slurm()] if c]
    if choice != "auto":
        said = [c for c in said if c.kind == choice]
        if not said:
            raise InvalidArgument(
                f"MOECOMM_GROUP is {choice!r}, but no variable of such a launcher is set; start the ranks with one, or "
                f"{launch.HOW}",
                op="Communicator",
            )
    launch.require_agreement(said)
    return _launched(said, timeout) if said else Alone()


def _launched(said: Any, timeout: float) -> Any:
    """Return the bootstrap for the claims of launchers, which agree."""
    rank, size = (
        next((getattr(c, name) for c in said if getattr(c, name) is not None), None)
        for name in ("rank", "size")
    )
    if size == 1:
        return Alone()
    where: Any = (
        None
        if rank is None or size is None
        else next(filter(None, (launch.meeting_point(os.environ, c) for c in said)), None)
    )
    if any(c.kind == "mpi" for c in said):
        comm = _mpi_world()
        if comm is not None:
            world = launch.Claim("mpi", "MPI.COMM_WORLD of mpi4py", comm.Get_rank(), comm.Get_size())
            launch.require_agreement([world, *said])
            if comm.Get_size() > 1:
                return groups.connect(groups.Mpi(comm, timeout), timeout)
        elif where is None:
            raise InvalidArgument(
                f"group is None, and {said[0]} says that this process is one of several, but mpi4py is missing; run "
                f"pip install mpi4py, or set MASTER_ADDR and MASTER_PORT for all ranks. Otherwise {launch.HOW}",
                op="Communicator",
            )
    if where is not None and rank is not None and size is not None:
        host, port = where
        return groups.connect(groups.of_store(host, port, rank, size, timeout), timeout)
    missing = "rank and size" if rank is None or size is None else "MASTER_ADDR and MASTER_PORT"
    raise InvalidArgument(
        f"group is None, and {', '.join(map(str, said))} is set, so this process seems to be part of a launched job, "
        f"but its {missing} are unknown; {launch.HOW}",
        op="Communicator",
    )


def _mpi_world() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # no mpi4py, or one without a libmpi
        return None
    return MPI.COMM_WORLD


def make_default_group(**how: Any) -> None:
    """Initialize the default group of torch.distributed over gloo, so that destroying it frees everything.

    how: arguments of init_process_group.
    """
    import torch.distributed as dist

    # Functions of this module have the default group of the moment of its import as a default argument. Imported later,
    # it would keep the group alive forever.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group("gloo", **how)
