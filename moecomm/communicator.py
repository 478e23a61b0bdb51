"""Communicator: the ranks, their nodes, and the connections between nodes."""

from __future__ import annotations

from typing import Any

import os
import socket
import weakref

import torch

from ._bootstrap import bootstrap

from ._cuda import cuda
from ._cuda.calls import Calls
from ._cuda.state import CudaState

from ._native import core
from ._version import __version__
from .awaited import Awaited
from .call_order import CallOrder
from .collective import Collective
from .elastic.health import Healthy
from .env import Environment
from .deadlines import patience_of, require_one_host, seconds_of, to_meet
from .errors import InvalidArgument
from .shapes import as_int
from .shared import Shared


def _host_identity() -> str:
    """Return an identity that is equal on ranks that can share memory: kernel, network and PID namespace."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        boot = f.read().strip()
    return "/".join(
        [boot, socket.gethostname(), *(os.readlink(f"/proc/self/ns/{space}") for space in ("net", "pid"))]
    )


_living: weakref.WeakSet[Communicator] = weakref.WeakSet()


def _in_forked_child() -> None:
    """Replace inherited objects in a forked child. Threads, mappings and connections stay with the parent."""
    for comm in _living:
        comm.order.stay_with_parent()


os.register_at_fork(after_in_child=_in_forked_child)


def as_device(device: Any, op: str) -> torch.device:
    """Return a torch.device.

    Raises
    ------
    InvalidArgument
        There is no such device.
    """
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise InvalidArgument(f"device is {device!r}; expected cpu or cuda", op=op) from None


def _device_of(device: Any) -> torch.device:
    """Return the torch.device of a rank; refuse devices that do not exist on this machine."""
    found = as_device(device, "Communicator")
    if found.type == "cuda":
        cuda.require("Communicator")
        return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    if found.type != "cpu":
        raise InvalidArgument(f"device is {found}; expected cpu or cuda", op="Communicator")
    return found


class Communicator(Awaited, Healthy, Shared):
    """The group of ranks among which dispatch and combine move tokens.

    Parameters
    ----------
    group : torch ProcessGroup, one-dimensional DeviceMesh, mpi4py Comm, "alone" or None
        None: torch.distributed's default group if it is initialized; else the ranks from the environment variables of
        the launcher (torchrun, or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; mpirun; srun); else a single rank.
        If sources contradict each other, or a single rank seems to be in a launched job, that is an error: pass the
        group, or set MOECOMM_GROUP. "alone": a single rank in any environment. Torch groups and MPI are used only to
        exchange addresses.
    ranks_per_node : int, optional
        Number of consecutive ranks that share memory. None: the ranks of a host.
    device : str or torch.device, optional
        "cpu", or "cuda" (the current GPU, or the named one; ranks may share a GPU). Processes use CUDA IPC on one host,
        and NCCL on several hosts or if MOECOMM_CUDA_FABRIC=nccl.
    timeout : float, optional
        Timeout of every wait in seconds. Equal on all ranks. None: MOECOMM_TIMEOUT, else 120.
    patience : "deadline" or "alive"
        "alive": calls wait while a peer lives and is not stopped; the timeout counts from its last sign of life. For
        processes of one host without GPUs. Barriers and constructors keep the deadline.

    Raises
    ------
    InvalidArgument
        An argument or a MOECOMM_* variable is invalid on some rank; raised on all ranks, and the message names it.
        The ranks do not divide into nodes of ranks_per_node, or a node spans hosts (or PID namespaces). The cuda world
        is not available here, or not between these hosts; the message names the expected version of NCCL. The
        environment is contradictory.
    ConfigMismatch
        Ranks differ in ranks_per_node, device, timeout, MOECOMM_RAIL or the version of moecomm.
    PeerTimeout, PeerLost
        A rank does not respond within the timeout, or its process has ended. .peer names the rank.

    Source: the two networks and the rail of DeepSeek-V3, technical report, section 3.2.2.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        ranks_per_node: int | None = None,
        device: torch.device | str | None = None,
        timeout: float | None = None,
        patience: str = "deadline",
    ) -> None:
        ranks_per_node = as_int(ranks_per_node)
        # A rank with invalid arguments still takes part in the first round, so that the others get its error.
        boot = bootstrap.find(group, to_meet(timeout))
        self.rank, self.size = boot.rank, boot.size
        self.mesh = group if hasattr(group, "mesh_dim_names") else None  # for the experts of layers
        # Parts for the other modules of moecomm, not for users.
        self.order = CallOrder(self.rank)
        self.collective = Collective(boot, self.order)
        self.windows: Any = weakref.WeakValueDictionary()  # shared by buffers, by shape
        self.cuda: CudaState | None = None  # in the cuda world
        self.gpu_calls: Any = None  # the same
        self._use(boot, None)

        def arguments() -> Any:
            if boot.complaint is not None:
                raise boot.complaint
            seconds = seconds_of(timeout, "Communicator")
            if not isinstance(ranks_per_node, (int, type(None))):
                raise InvalidArgument(
                    f"ranks_per_node is {ranks_per_node!r}; expected a divisor of the {self.size} ranks",
                    op="Communicator",
                    rank=self.rank,
                )
            self.device, self.timeout = _device_of(device), seconds
            self.patience = patience_of(patience, self.device, boot.threads)
            same = {
                "version": __version__,
                "ranks_per_node": ranks_per_node,
                "device": self.device.type,
                "timeout": self.timeout,
                "patience": self.patience,
            }
            return (
                same,
                {"MOECOMM_RAIL": self._rail_between_nodes(Environment().rail)},
                None if boot.threads else _host_identity(),
            )

        try:
            self._join_world(arguments, ranks_per_node)
        except BaseException:
            boot.close()  # if this fails, no rank has a communicator
            raise

    def _join_world(self, arguments: Any, ranks_per_node: Any) -> None:
        boot = self.bootstrap
        everyone, rails, hosts = zip(*self.collective.everywhere("Communicator", arguments), strict=True)
        self.collective.require_equal("Communicator", everyone)
        self.ranks_per_node = self._node_size(ranks_per_node, hosts)
        require_one_host(self.patience, hosts)
        self.num_nodes = self.size // self.ranks_per_node
        self.node, self.local_rank = divmod(self.rank, self.ranks_per_node)
        self.gpu = (
            self.device.index if self.device.type == "cuda" else None
        )  # number of its GPU; None: the cpu world
        if self.num_nodes == 1:
            self.rail = "none"
        elif self.gpu is not None:
            self.rail = "loopback"  # changed below if needed
        else:
            self.collective.require_equal("Communicator", rails)
            self.rail = rails[0]["MOECOMM_RAIL"]
            if self.rail == "loopback" and not boot.threads:
                raise InvalidArgument(
                    "MOECOMM_RAIL is 'loopback'; expected 'ucx' or 'auto' between nodes of processes",
                    op="Communicator",
                    rank=self.rank,
                )
        native = self.collective.join(
            "Communicator",
            lambda: core.Communicator(
                self.rank,
                self.size,
                self.ranks_per_node,
                boot.threads,
                self.rail if self.gpu is None else "none",
                self.timeout,
                self.patience == "alive",
            ),
        )
        self._use(boot, native)
        self.maps_peers = True  # in the cuda world: NCCL does not do it
        if self.gpu is not None:
            peer_access = cuda.peer_access_of(self, hosts)
            self.cuda = CudaState(peer_access, self.device)
            self.gpu_calls = self.collective.join(
                "Communicator", lambda: Calls(cuda.native(), peer_access, self)
            )
            if boot.threads:
                boot.keep(self.gpu_calls.native)
            if self.num_nodes > 1 and peer_access.rail != "memory":
                self.rail = peer_access.rail
        _living.add(self)

    def _use(self, boot: Any, native: Any) -> None:
        """Use this bootstrap and this native communicator, here and in the parts. The rank is that of the bootstrap."""
        self.bootstrap, self.native = boot, native
        self.collective.bootstrap, self.collective.native = boot, native
        self.order.rank, self.order.native = boot.rank, native

    def _rail_between_nodes(self, wanted: str) -> str:
        return wanted if wanted != "auto" else "loopback" if self.bootstrap.threads else "ucx"

    def _node_size(self, wanted: int | None, hosts: Any) -> int:
        if wanted is None:
            if hosts[0] is None:
                return self.size
            runs: list[int] = [hosts.count(h) for h in dict.fromkeys(hosts)]
            consecutive = all(
                hosts[i] == hosts[i - 1] or hosts[i] not in hosts[:i] for i in range(1, self.size)
            )
            if len(set(runs)) > 1 or not consecutive:
                raise InvalidArgument(
                    f"ranks_per_node is None, and hosts have {runs} ranks; expected equal runs of ranks on all hosts",
                    op="Communicator",
                    rank=self.rank,
                )
            return runs[0]
        if not isinstance(wanted, int) or wanted < 1 or self.size % wanted:
            raise InvalidArgument(
                f"ranks_per_node is {wanted!r}; expected a divisor of the {self.size} ranks",
                op="Communicator",
                rank=self.rank,
            )
        for first in range(0, self.size, wanted):
            if len(set(hosts[first : first + wanted])) > 1:
                raise InvalidArgument(
                    f"ranks_per_node is {wanted}, but ranks {first}..{first + wanted - 1} are on different hosts; "
                    "expected each node on one host",
                    op="Communicator",
                    rank=self.rank,
                )
        return wanted

    def exchange(self, value: Any) -> list[Any]:
        """Return the values of all ranks: numbers, strings, bytes, None, lists and dicts. Collective; slow.

        Raises
        ------
        InvalidArgument, PeerTimeout, PeerLost
            The value has another type. A rank does not make the call.
        """
        self.order.require_open("exchange")
        everyone: list[Any] = self.collective.exchange(value)
        return everyone

    def close(self) -> None:
        """Release the resources of this communicator. Local, may be called twice.

        First waits for a running call of another thread. Inside a call of this thread (in a signal handler or a
        finalizer), it takes effect when that call returns.
        """
        if self.order.closed:
            return
        self.order.close()
        if not self.native.after_call(self._release):
            self._release()

    def _release(self) -> None:
        self._end_growth()
        self.order.end()
        self.native.release()
        self.bootstrap.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f"rank={self.rank}, size={self.size}, nodes={self.num_nodes}x{self.ranks_per_node}"
        return f"Communicator({where}, rail={self.rail!r})"
