"""World: the ranks of a benchmark, over mpi4py or torch.distributed, with barrier, allgather and shared tables."""

from __future__ import annotations

import atexit
import mmap
import os
import socket
import time

import torch
import torch.distributed as dist

from moecomm._bootstrap.bootstrap import make_default_group


def join_gloo(**how):
    """Make the default group of torch.distributed (gloo), and destroy it at exit, where its threads could abort."""
    make_default_group(**how)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


class World:
    """Rank, size, barrier and allgather of the ranks, and `group` for Communicator."""

    def __init__(self, group, rank, size, barrier, allgather):
        self.group, self.rank, self.size, self.barrier, self.allgather = group, rank, size, barrier, allgather
        self.one_host = len(set(allgather(_boot_id()))) == 1

    @staticmethod
    def from_mpi(comm):
        """Make a World of an mpi4py communicator."""
        return World(comm, comm.Get_rank(), comm.Get_size(), comm.Barrier, comm.allgather)

    @staticmethod
    def from_torch():
        """Make a World of the default group of torch.distributed."""

        def allgather(value):
            out = [None] * dist.get_world_size()
            dist.all_gather_object(out, value)
            return out

        return World(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), dist.barrier, allgather)

    def gloo(self):
        """Make the default group of torch.distributed (gloo), unless it exists."""
        if dist.is_initialized():
            return
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if self.one_host else "")
        if not os.environ["GLOO_SOCKET_IFNAME"]:
            del os.environ["GLOO_SOCKET_IFNAME"]
        host = "127.0.0.1" if self.one_host else socket.gethostbyname(socket.gethostname())
        store = (
            dist.TCPStore(host, 0, self.size, is_master=True, wait_for_workers=False)
            if self.rank == 0
            else None
        )
        host, port = self.allgather((host, store.port if store else 0))[0]
        if store is None:
            store = dist.TCPStore(host, port, self.size, is_master=False)
        join_gloo(store=store, rank=self.rank, world_size=self.size)

    def span(self, start, end):
        """Seconds from the start of the first rank to the end of the last; on several hosts, of the slowest rank."""
        times = self.allgather((start, end))
        if self.one_host:
            return max(e for _, e in times) - min(s for s, _ in times)
        return max(e - s for s, e in times)

    def timed(self, work, *args):
        """Call work(*args) on all ranks after a barrier: (its result, span)."""
        self.barrier()
        start = time.perf_counter()
        result = work(*args)
        end = time.perf_counter()
        return result, self.span(start, end)

    def table(self, tensor, stride):
        """Rows of all ranks [size * stride, ...]: row r of rank s at s * stride + r. Shared memory on one host."""
        shape = (self.size * stride, *tensor.shape[1:])
        if not self.one_host:
            table = torch.zeros(shape, dtype=tensor.dtype)
            for rank, rows in enumerate(self.allgather(tensor)):
                table[rank * stride : rank * stride + len(rows)] = rows
            return table
        size = max(torch.Size(shape).numel() * tensor.element_size(), 1)
        fd = os.memfd_create("bench") if self.rank == 0 else -1
        if fd >= 0:
            os.ftruncate(fd, size)
        pid, its_fd = self.allgather((os.getpid(), fd))[0]
        with open(f"/proc/{pid}/fd/{its_fd}", "r+b", buffering=0) as file:
            table = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=tensor.dtype).view(shape)
        table[self.rank * stride : self.rank * stride + len(tensor)] = tensor
        self.barrier()
        if fd >= 0:
            os.close(fd)
        return table


def _boot_id():
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read()
