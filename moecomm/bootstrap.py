"""How ranks find each other before they share memory: allgather of bytes and a barrier, over what is there.

A bootstrap is used when communicators and buffers are made, never on the data path.
"""

from __future__ import annotations

import datetime
import os
import threading
import time

from .errors import InvalidArgument, PeerLost, PeerTimeout


class Alone:
    """One rank."""

    rank, size, threads = 0, 1, False

    def allgather(self, data):
        """Everyone's bytes by rank."""
        return [data]

    def barrier(self):
        """Nobody to wait for."""

    def subset(self, ranks):
        """A bootstrap of these ranks; collective over them alone."""
        return Alone()

    def close(self):
        """Nothing to close."""


class Mpi:
    """An mpi4py communicator."""

    threads = False

    def __init__(self, comm, timeout):
        self._comm = comm
        self._timeout = timeout
        self._subsets = 0
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def allgather(self, data):
        """Everyone's bytes by rank."""
        self.barrier()   # with a deadline, unlike the collective below
        return self._comm.allgather(data)

    def barrier(self):
        """All ranks meet, within the timeout."""
        request = self._comm.Ibarrier()
        deadline = time.monotonic() + self._timeout
        while not request.Test():
            if time.monotonic() > deadline:
                raise PeerTimeout(f"bootstrap on rank {self.rank}: not every rank came to the barrier within {self._timeout} s",
                                  op="bootstrap", rank=self.rank)
            time.sleep(0.0002)

    def subset(self, ranks):
        """A bootstrap of these ranks; collective over them alone."""
        self._subsets += 1
        return Mpi(self._comm.Create_group(self._comm.Get_group().Incl(list(ranks)), self._subsets % 16384), self._timeout)

    def close(self):
        """The communicator is the caller's."""


class Torch:
    """A torch.distributed process group (gloo or any that gathers objects)."""

    threads = False

    def __init__(self, group, timeout, owned=False):
        import torch.distributed as dist

        self._dist, self._group, self._owned, self._timeout = dist, group, owned, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def allgather(self, data):
        """Everyone's bytes by rank."""
        out = [None] * self.size
        try:
            self._dist.all_gather_object(out, data, group=self._group)
        except RuntimeError as error:
            raise PeerLost(f"bootstrap on rank {self.rank}: {error}", op="bootstrap", rank=self.rank) from error
        return out

    def barrier(self):
        """All ranks meet."""
        self.allgather(b"")

    def subset(self, ranks):
        """A bootstrap of these ranks; collective over them alone. The store of the first group must still be reachable."""
        everywhere = [self._dist.get_global_rank(self._group, r) for r in ranks]
        group = self._dist.new_group(everywhere, datetime.timedelta(seconds=self._timeout), "gloo", use_local_synchronization=True)
        return Torch(group, self._timeout)

    def close(self):
        """Leaves the default group only where this library made it."""
        # The last reference ends gloo's threads: one that still holds a tensor when the interpreter ends would abort the process.
        self._group = None
        if self._owned and self._dist.is_initialized():
            self._dist.destroy_process_group()


class ThreadWorld:
    """What the rank threads of one run_local share."""

    def __init__(self, size, timeout):
        self.size, self.timeout = size, timeout
        self.barrier = threading.Barrier(size)
        self.cards = [None] * size
        self.failed = None            # rank whose function raised first
        self.kept = []                # windows stay mapped until every rank thread has ended
        self.lock = threading.Lock()
        self.parts = {}               # worlds of some of the ranks, by their names

    def part(self, name, size):
        """The world of a subset of the ranks: the same for all that ask by the same name."""
        with self.lock:
            return self.parts.setdefault(name, ThreadWorld(size, self.timeout))


class Thread:
    """One rank thread of run_local."""

    threads = True

    def __init__(self, world, rank):
        self._world, self.rank, self.size = world, rank, world.size
        self._subsets = {}            # how often this rank has made each

    def keep(self, owner):
        """Keep memory that other rank threads reach by pointer until all of them have ended."""
        self._world.kept.append(owner)

    def allgather(self, data):
        """Everyone's bytes by rank."""
        self._world.cards[self.rank] = data
        self.barrier()
        out = list(self._world.cards)
        self.barrier()
        return out

    def subset(self, ranks):
        """A bootstrap of these ranks; collective over them alone."""
        ranks = tuple(ranks)
        self._subsets[ranks] = self._subsets.get(ranks, 0) + 1
        return Thread(self._world.part((ranks, self._subsets[ranks]), len(ranks)), ranks.index(self.rank))

    def barrier(self):
        """All rank threads meet, within the timeout."""
        try:
            self._world.barrier.wait(self._world.timeout)
        except threading.BrokenBarrierError:
            failed = self._world.failed
            if failed is not None:
                raise PeerLost(f"bootstrap on rank {self.rank}: rank {failed} has left with an exception", op="bootstrap",
                               rank=self.rank, peer=failed) from None
            raise PeerTimeout(f"bootstrap on rank {self.rank}: not every rank came within {self._world.timeout} s",
                              op="bootstrap", rank=self.rank) from None

    def close(self):
        """Nothing to close."""


def find(group, timeout):
    """The bootstrap for a group: a torch ProcessGroup, an mpi4py Comm, or None for what the environment says.

    Raises
    ------
    InvalidArgument
        The group is of no known kind.
    """
    if group is None:
        return _from_environment(timeout)
    if isinstance(group, (Alone, Mpi, Torch, Thread)):
        return group
    kind = type(group).__module__
    if kind.startswith("mpi4py"):
        return Mpi(group, timeout)
    if hasattr(group, "rank") and hasattr(group, "size") and kind.startswith(("torch", "torch._C")):
        return Torch(group, timeout)
    raise InvalidArgument(f"group: got {type(group).__qualname__}; expected a torch ProcessGroup, an mpi4py Comm or None", op="Communicator")


def make_default_group(**how):
    """torch.distributed's default group over gloo, of which nothing is left when it is destroyed; init_process_group's arguments."""
    import torch.distributed as dist

    # Defaults of its functions are the default group of the moment it is imported, kept for ever: the group would outlive its end.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group("gloo", **how)


def _from_environment(timeout):
    e = os.environ
    if any(name in e for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")):
        from mpi4py import MPI

        return Mpi(MPI.COMM_WORLD, timeout)
    if "RANK" in e and "WORLD_SIZE" in e:
        import torch.distributed as dist

        owned = not dist.is_initialized()
        if owned:
            make_default_group(timeout=datetime.timedelta(seconds=timeout))
        return Torch(dist.group.WORLD, timeout, owned)
    return Alone()
