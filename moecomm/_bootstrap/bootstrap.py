"""How ranks find each other before they share memory: everyone's bytes and a meeting, over what is there.

A bootstrap is used when communicators and buffers are made, in barrier, and when experts migrate; never on the data path.

What listens where. Every rank that is a process listens on one UNIX socket with a random name in the abstract namespace, which any process of the
same network namespace can call, and, only where ranks are in several network namespaces (hosts), on one TCP port that the kernel chooses, bound to one IP
address: that of MOECOMM_SOCKET_IFNAME, else of GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, else the one on the way to MASTER_ADDR, that of the host name, or that
of the default route. Both are open from Communicator() until the last communicator that came of it is closed. Who calls must sign (HMAC-SHA256) with a random
token of 32 bytes of the rank that is called, and is answered with a signature by its own token; tokens travel once, through the caller's group (a torch
group's store, MPI, or the store at MASTER_ADDR), and whoever can read that can join. What follows is neither encrypted nor signed: on TCP a network is
trusted not to change it. It is JSON, checked as it is read; nothing of it is executed. Rank 0 also holds a torch TCPStore at MASTER_PORT, on every
interface and without authentication, where a world is found by RANK and WORLD_SIZE (or by Slurm's variables), torch's default group is not
initialized, and no agent of torchrun holds one. UCX's and NCCL's own ports are not these.
"""

from __future__ import annotations

import os
import threading
import time

from . import groups, launch
from ..errors import InvalidArgument, PeerLost, PeerTimeout
from .mesh import Mesh


class Alone:
    """One rank."""

    rank, size, threads, complaint = 0, 1, False, None

    def allgather(self, data, op="bootstrap"):  # noqa: ARG002 - nobody can be late
        """Everyone's bytes by rank."""
        return [data]

    def subset(self, ranks):  # noqa: ARG002 - there is one
        """A bootstrap of these ranks; collective over them alone."""
        return Alone()

    def refuse(self, ranks, why):
        """Nobody to tell."""

    def interrupt(self, why):
        """Nobody to tell."""

    def close(self):
        """Nothing to close."""


class ThreadWorld:
    """What the rank threads of one run_local share."""

    def __init__(self, size, timeout):
        self.size, self.timeout = size, timeout
        self.barrier = threading.Barrier(size)
        self.cards = [None] * size
        self.failed = None  # rank whose function raised first
        self.kept = []  # windows stay mapped until every rank thread has ended
        self.changed = threading.Condition()
        self.parts = {}  # worlds of some of the ranks, by their names
        self.arrived = {}  # name of a part -> ranks that have come to make it
        self.refusals = {}  # rank -> [(ranks that it told, text)]: parts that it has refused to make


class Thread:
    """One rank thread of run_local."""

    threads, complaint = True, None

    def __init__(self, world, rank):
        self._world, self.rank, self.size = world, rank, world.size
        self._subsets = {}  # how often this rank has made each
        self._heard = {}  # how many refusals of a rank it knows

    def keep(self, owner):
        """Keep memory that other rank threads reach by pointer until all of them have ended."""
        self._world.kept.append(owner)

    def allgather(self, data, op="bootstrap"):
        """Everyone's bytes by rank; op: the call that needs them, for the messages of errors."""
        self._world.cards[self.rank] = data
        self._meet(op)
        out = list(self._world.cards)
        self._meet(op)
        return out

    def subset(self, ranks):
        """A bootstrap of these ranks; collective over them alone."""
        world, ranks = self._world, tuple(ranks)
        self._subsets[ranks] = self._subsets.get(ranks, 0) + 1
        name = ranks, self._subsets[ranks]
        deadline = time.monotonic() + world.timeout
        with world.changed:
            part = world.parts.setdefault(name, ThreadWorld(len(ranks), world.timeout))
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
                        f"bootstrap on rank {self.rank}: rank {world.failed} has left with an exception",
                        op="bootstrap",
                        rank=self.rank,
                        peer=world.failed,
                    )
                left = deadline - time.monotonic()
                if left <= 0:
                    absent = [r for r in ranks if r not in come]
                    raise PeerTimeout(
                        f"bootstrap on rank {self.rank}: ranks {absent} have not come within {world.timeout} s",
                        op="bootstrap",
                        rank=self.rank,
                        peer=absent[0],
                    )
                world.changed.wait(min(left, 0.1))
        return Thread(part, ranks.index(self.rank))

    def refuse(self, ranks, why):  # noqa: ARG002 - whoever waits for this rank looks
        """Tell those ranks that this one makes no part with them."""
        with self._world.changed:
            self._world.refusals.setdefault(self.rank, []).append(why)
            self._world.changed.notify_all()

    def interrupt(self, why):
        """The exception that this rank thread leaves with releases the others."""

    def _meet(self, op):
        try:
            self._world.barrier.wait(self._world.timeout)
        except threading.BrokenBarrierError:
            failed = self._world.failed
            if failed is not None:
                raise PeerLost(
                    f"{op} on rank {self.rank}: rank {failed} has left with an exception",
                    op=op,
                    rank=self.rank,
                    peer=failed,
                ) from None
            raise PeerTimeout(
                f"{op} on rank {self.rank}: not every rank came within {self._world.timeout} s",
                op=op,
                rank=self.rank,
            ) from None

    def close(self):
        """Nothing to close."""


def find(group, timeout):
    """The bootstrap for a group: a torch ProcessGroup or one-dimensional DeviceMesh, an mpi4py Comm, "alone", or None for what the environment says.

    .complaint: None, or the InvalidArgument that this rank has to raise: once the others can learn of it.

    Raises
    ------
    InvalidArgument
        The group is of no known kind; the environment says nothing that can be followed, or contradicts itself.
    PeerTimeout, PeerLost
        A rank has not come, or is gone.
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
                    f"group: got a DeviceMesh of {group.ndim} dimensions {group.mesh_dim_names or tuple(group.shape)}; expected one of one "
                    'dimension, the ranks among which experts are spread (mesh["ep"], say)',
                    op="Communicator",
                )
            group = group.get_group()
        if isinstance(group, dist.ProcessGroup):
            return _joined(groups.of_torch(group, timeout), timeout)
    if isinstance(group, int) and _is_no_member(group):
        raise InvalidArgument(
            "group: got torch's GroupMember.NON_GROUP_MEMBER: this process is no member; expected only members to make a Communicator of a "
            "group",
            op="Communicator",
        )
    raise InvalidArgument(
        f'group: got {type(group).__qualname__}; expected a torch ProcessGroup, a one-dimensional DeviceMesh, an mpi4py Comm, "alone" or None',
        op="Communicator",
    )


def _is_no_member(group):
    import torch.distributed as dist

    return dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER


def _joined(group, timeout):
    return Alone() if group.size == 1 else groups.connect(group, timeout)


def _from_environment(timeout):
    import torch.distributed as dist

    choice = os.environ.get(
        "MOECOMM_GROUP", "auto"
    )  # a wrong one is refused with the other variables, on every rank
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
            "MOECOMM_GROUP: got 'torch', and torch.distributed's default group is not initialized; expected init_process_group() before "
            "Communicator()",
            op="Communicator",
        )
    said = launch.claims() if choice in ("auto", "env", "mpi") else [c for c in [launch.slurm()] if c]
    if choice != "auto":
        said = [c for c in said if c.kind == choice]
        if not said:
            raise InvalidArgument(
                f"MOECOMM_GROUP: got {choice!r}, and no variable of such a launcher is set; expected a launcher, or {launch.HOW}",
                op="Communicator",
            )
    launch.require_agreement(said)
    return _launched(said, timeout) if said else Alone()


def _launched(said, timeout):
    """The bootstrap for what launchers say, who agree."""
    rank, size = (
        next((getattr(c, name) for c in said if getattr(c, name) is not None), None)
        for name in ("rank", "size")
    )
    if size == 1:
        return Alone()
    where = (
        None
        if rank is None or size is None
        else next(filter(None, (launch.meeting_point(os.environ, c) for c in said)), None)
    )
    if any(c.kind == "mpi" for c in said):
        comm = _mpi_world()
        if comm is not None:
            world = launch.Claim("mpi", "MPI.COMM_WORLD of mpi4py", comm.Get_rank(), comm.Get_size())
            launch.require_agreement([world, *said])
            if world.size > 1:
                return groups.connect(groups.Mpi(comm, timeout), timeout)
        elif where is None:
            raise InvalidArgument(
                f"group: {said[0]} says that this process is one of several, and there is no mpi4py to join them; expected pip install mpi4py, "
                f"or MASTER_ADDR and MASTER_PORT in the environment of all. Otherwise {launch.HOW}",
                op="Communicator",
            )
    if where is not None:
        return groups.connect(groups.of_store(*where, rank, size, timeout), timeout)
    missing = "rank and size" if rank is None or size is None else "MASTER_ADDR and MASTER_PORT"
    raise InvalidArgument(
        f"group: this process would be alone in what looks like a launched job: {', '.join(map(str, said))} is set, and {missing} cannot be "
        f"known; {launch.HOW}",
        op="Communicator",
    )


def _mpi_world():
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # none, or one without a libmpi
        return None
    return MPI.COMM_WORLD


def make_default_group(**how):
    """torch.distributed's default group over gloo, of which nothing is left when it is destroyed; init_process_group's arguments."""
    import torch.distributed as dist

    # Defaults of its functions are the default group of the moment it is imported, kept for ever: the group would outlive its end.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group("gloo", **how)
