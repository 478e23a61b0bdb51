"""The caller's groups. They exchange the contact of every rank once; everything later goes over sockets of moecomm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datetime
import json
import os
import threading
import time

from .clock import Clock
from ..errors import InvalidArgument, MoecommError, PeerLost, PeerTimeout
from .generations import GenerationMesh
from .sockets import Endpoint

_SLOT = 1024  # bytes for a contact in an exchange of equal sizes
_abandoned: list[Any] = []  # (request, buffers) of exchanges that did not end; MPI may still write to them


def _late(rank: int, absent: Sequence[int], timeout: float) -> Any:
    who = (
        "some rank has"
        if not absent
        else f"rank {absent[0]} has"
        if len(absent) == 1
        else f"ranks {', '.join(map(str, absent[:16]))} have"
    )
    return PeerTimeout(
        f"Communicator on rank {rank}: {who} not made its Communicator within {timeout} s; expected every rank of "
        "the group to make one",
        op="Communicator",
        phase="connect",
        rank=rank,
        peer=absent[0] if absent else None,
    )


def _aside(work: Callable[[], Any], timeout: float, late: Any) -> Any:
    """Return work(), run in another thread, so that Ctrl-C and the deadline work while a library waits inside."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:  # noqa: BLE001 - raised below
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="moecomm-join", daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise late()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


class Store:
    """A torch store that all ranks reach: that of the caller's group, or that of a launcher."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float, host: Any = None) -> None:
        self._store, self.rank, self.size, self._timeout, self._host = store, rank, size, timeout, host
        self._call = (
            None  # number of this Communicator on this rank; the store counts, so all ranks have the same one
        )

    def gather(self, what: str, text: str) -> Any:
        """Return the texts of all ranks, by rank."""
        clock = Clock(self._timeout)
        absent: list[Any] = []

        def work() -> Any:
            if self._call is None:
                self._call = self._store.add(f"moecomm/calls/{self.rank}", 1)
            keys = [f"moecomm/{self._call}/{what}/{r}" for r in range(self.size)]
            self._store.set(keys[self.rank], text)
            pause, left = 0.001, list(range(self.size))
            while True:
                if self._store.check([keys[r] for r in left[:64]]):  # in pieces, in the order of ranks
                    left = left[64:]
                    if not left:
                        return [
                            bytes(v).decode()
                            for v in (
                                self._store.multi_get(keys)
                                if self._store.has_extended_api()
                                else map(self._store.get, keys)
                            )
                        ]
                    continue
                if clock.passed():
                    absent[:] = [r for r in left if not self._store.check([keys[r]])]
                    raise _late(self.rank, absent, self._timeout)
                time.sleep(pause)
                pause = min(0.02, 1.5 * pause)

        try:
            return _aside(
                work,
                self._timeout + 2.0,
                lambda: PeerTimeout(
                    f"Communicator on rank {self.rank}: the store of the group has not answered within {self._timeout} "
                    "s",
                    op="Communicator",
                    phase="connect",
                    rank=self.rank,
                    peer=self._host,
                ),
            )
        except MoecommError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            raise PeerLost(
                f"Communicator on rank {self.rank}: the store of the group is gone ({error}), probably because "
                f"{'its host' if self._host is None else f'rank {self._host}, which holds it,'} has ended",
                op="Communicator",
                phase="connect",
                rank=self.rank,
                peer=self._host,
            ) from error


class Objects:
    """A torch group without a store."""

    def __init__(self, group: Any, timeout: float) -> None:
        import torch.distributed as dist

        self._dist, self._group, self._timeout = dist, group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, what: str, text: str) -> Any:  # noqa: ARG002 - collective calls match by their order
        """Return the texts of all ranks, by rank."""
        out = [None] * self.size
        try:
            _aside(
                lambda: self._dist.all_gather_object(out, text, group=self._group),
                self._timeout,
                lambda: _late(self.rank, [], self._timeout),
            )
        except MoecommError:
            raise
        except (RuntimeError, ValueError) as error:
            raise PeerLost(
                f"Communicator on rank {self.rank}: the torch group has failed: {error}",
                op="Communicator",
                phase="connect",
                rank=self.rank,
            ) from error
        return [str(text) for text in out]


class Mpi:
    """An mpi4py communicator."""

    def __init__(self, comm: Any, timeout: float) -> None:
        self._comm, self._timeout = comm, timeout
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def gather(self, what: str, text: str) -> Any:  # noqa: ARG002 - collective calls match by their order
        """Return the texts of all ranks, by rank."""
        mine, everyone = bytearray(text.encode().ljust(_SLOT)), bytearray(_SLOT * self.size)
        request, clock = self._comm.Iallgather(mine, everyone), Clock(self._timeout)
        try:
            while not request.Test():
                if clock.passed():
                    raise _late(
                        self.rank,
                        [r for r in range(self.size) if everyone[r * _SLOT] == 0 and r != self.rank],
                        self._timeout,
                    )
                time.sleep(0.0002)
        except BaseException:
            _abandoned.append((request, mine, everyone))
            raise
        return [everyone[r * _SLOT : (r + 1) * _SLOT].decode().rstrip() for r in range(self.size)]


def of_torch(group: Any, timeout: float) -> Any:
    """Return the Store of a torch ProcessGroup, or Objects if it has no store.

    Raises
    ------
    InvalidArgument
        This rank is not a member.
    """
    import torch.distributed as dist

    rank = dist.get_rank(group)
    if rank < 0:
        raise InvalidArgument(
            "group is a torch group of which this process is not a member; expected only members to make its "
            "Communicator",
            op="Communicator",
        )
    try:
        store = group.get_group_store()
    except (RuntimeError, AttributeError):
        return Objects(group, timeout)
    if store is None:
        return Objects(group, timeout)
    # With env:// and tcp:// of init_process_group, global rank 0 holds the store. If torchrun has started the ranks,
    # its agent may hold it.
    first = (
        None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        else next((r for r, g in enumerate(dist.get_process_group_ranks(group)) if g == 0), None)
    )
    return Store(store, rank, dist.get_world_size(group), timeout, first)


_stores: dict[
    Any, Any
] = {}  # kept alive: rank 0's store is the server, and later Communicators of other ranks connect to it


def of_store(host: Any, port: int, rank: int, size: int, timeout: float) -> Any:
    """Return the Store at an address. The agent of torchrun holds it if it has started the ranks, else rank 0.

    Raises
    ------
    PeerTimeout
        There is no store within the timeout.
    MoecommError
        Rank 0 cannot listen at the address.
    """
    import torch.distributed as dist

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = host, port, rank, size, life, agent

    def make() -> Any:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            size,
            not agent and rank == 0,
            datetime.timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
        return dist.PrefixStore(f"moecomm/{life}", store)  # type: ignore[attr-defined]

    def late() -> Any:
        return PeerTimeout(
            f"Communicator on rank {rank}: no store has answered at {host}:{port} (MASTER_ADDR and MASTER_PORT) within "
            f"{timeout} s; expected {'the agent of torchrun' if agent else 'rank 0'} to hold one",
            op="Communicator",
            phase="connect",
            rank=rank,
            peer=None if agent else 0,
        )

    if key not in _stores:
        try:
            _stores[key] = _aside(make, timeout + 2.0, late)
        except (RuntimeError, ValueError, OSError, TypeError) as error:
            if isinstance(error, MoecommError):
                raise
            if rank or agent:
                raise late() from error
            raise MoecommError(
                f"Communicator on rank 0: cannot hold a store at {host}:{port} (MASTER_ADDR and MASTER_PORT): {error}; "
                "expected a free port of this host",
                op="Communicator",
                phase="connect",
                rank=rank,
            ) from error
    return Store(_stores[key], rank, size, timeout, None if agent else 0)


def connect(group: Any, timeout: float) -> Any:
    """Return the Mesh of the ranks of a group. The group exchanges their contacts; then they connect sockets.

    Raises
    ------
    InvalidArgument
        Ranks are on several hosts, and one has no address for the others.
    PeerTimeout, PeerLost
        A rank has not made the call within the timeout, or has ended.
    """
    point = Endpoint()
    point.enter()
    try:
        networks = group.gather("network", point.network)
        try:
            point.listen_beyond(networks)
            mine = [point.contact(), None]
        except (InvalidArgument, OSError) as error:
            mine = [None, str(error)[:600]]
        everyone = [json.loads(text) for text in group.gather("contact", json.dumps(mine))]
        for r, (_, why) in enumerate(everyone):
            if why is not None:
                raise InvalidArgument(f"{why} (rank {r})", op="Communicator", rank=group.rank, peer=r)
        return GenerationMesh(
            point, [contact for contact, _ in everyone], range(group.size), group.rank, timeout
        )
    finally:
        point.leave()
