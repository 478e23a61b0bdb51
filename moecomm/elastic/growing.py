"""Growing: new ranks join a Communicator while its members serve, and members leave it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import os
import threading

from .._bootstrap import joining
from .._bootstrap.sockets import network_identity
from ..errors import InvalidArgument, MoecommError, PeerLost, PeerTimeout
from .lasting import Lasting
from .member import largest_nodes
from .renewed import arguments_from, buffers_of, renumber

if TYPE_CHECKING:
    from ..communicator import Communicator


def _host() -> str:
    """Return an identity that is equal on ranks that can share memory."""
    return f"{network_identity()}/{os.readlink('/proc/self/ns/pid')}"


class Entry(NamedTuple):
    """A rank of the next generation. Sorted by home and uid, the entries are in order of their ranks."""

    home: int
    uid: int
    rank: int  # the present rank, or -1 for a new rank
    joiner: dict[str, Any] | None  # what a new rank has said of itself


class Next:
    """The next generation, while it is made beside the present one."""

    def __init__(self, ranks: list[int], uids: list[int], homes: list[int]) -> None:
        self.ranks = ranks  # by rank of the next generation: the present rank, or -1 for a new rank
        self.uids, self.homes = uids, homes
        self.comm: Any = None
        self.buffers: list[tuple[int, Any]] = []
        self.error: Exception | None = None
        self.state = "ready"  # or "making", or "failed"
        self._dropped, self._lock = False, threading.Lock()

    def run(self, make: Any) -> None:
        """Call make(self) in another thread."""

        def work() -> None:
            state = "ready"
            try:
                make(self)
            except (MoecommError, OSError, RuntimeError) as error:
                state, self.error = "failed", error
            with self._lock:
                self.state = state
                if self._dropped:
                    self._release()

        self.state = "making"
        threading.Thread(target=work, name="moecomm-join", daemon=True).start()

    def drop(self) -> None:
        """Release everything that was made for it, now or when the thread has ended."""
        with self._lock:
            self._dropped = True
            if self.state != "making":
                self._release()

    def _release(self) -> None:
        for _, buffer in self.buffers:
            buffer.close()
        if self.comm is not None:
            self.comm.close()
        self.buffers, self.comm = [], None


class Growing(Lasting):
    """The part of Communicator that ranks join and leave.

    .offered: on a rank that joins, the arguments of every Buffer of the members, in the order of their construction.
    """

    offered: tuple[dict[str, Any], ...] = ()
    _joining = False  # this rank is not active yet
    _most = 0  # the largest number that was given to a rank
    _waiting: joining.Waiting | None = None
    barrier: Any
    _release: Any

    @property
    def address(self) -> str:
        """The address for join: it names this rank and up to seven others. Every process that knows it can join."""
        self._require_joinable("address")
        contacts = self.bootstrap.root()[1]
        address: str = joining.address_of(contacts[self.rank :] + contacts[: self.rank])
        return address

    @classmethod
    def join(cls, address: str, *, timeout: float | None = None) -> Communicator:
        """Return the Communicator of a new rank. It is connected, but receives no tokens until admit() returns True.

        Waits until the members call admit. Afterwards make their Buffers, Buffer(comm, **arguments) for each of
        .offered, load the weights of this rank's expert slots, and call admit.

        Parameters
        ----------
        address : str
            Communicator.address of a member.
        timeout : float, optional
            Seconds to wait for the members; None: 120.

        Raises
        ------
        InvalidArgument
            The address is invalid, or belongs to a host whose ranks this one cannot reach.
        PeerLost, PeerTimeout
            A member has ended, or the members do not admit this rank within the timeout.
        """
        told, mesh = joining.dial_in(address, 120.0 if timeout is None else timeout, _host())
        comm: Any = cls(  # type: ignore[call-arg]
            mesh.connect_once(),
            ranks_per_node=told["ranks_per_node"],
            timeout=told["timeout"],
            patience=told["patience"],
        )
        vars(comm).update(
            _uids=told["uids"],
            _homes=told["homes"],
            generation=told["generation"],
            offered=tuple(arguments_from(said) for said in told["buffers"]),
            _joining=True,
        )
        joined: Communicator = comm
        return joined

    def admit(self, leaving: Iterable[int] = ()) -> bool:
        """Let ranks join and leave between two steps. Collective. Return whether this call has changed the members.

        Admits new ranks that wait at the address of any member. The present generation goes on, and each call of admit
        costs one exchange, while another thread connects the next generation. When it is ready on all ranks, admit
        switches to it. If a rank of the next generation is lost before, the next generation is dropped. A new rank
        calls admit once, after it has made its Buffers, and waits there for the switch.

        New ranks first get expert slots of experts without a replica, then of those with the fewest replicas. They are
        admitted when the nodes keep their size; until then they wait.

        Parameters
        ----------
        leaving : iterable of int
            Ranks that leave: the same on all ranks, in every call until admit returns True. It closes their
            communicators. Experts that only they have are lost: move them before (rebalance, migrate, Buffer.use).

        Raises
        ------
        InvalidArgument
            leaving names ranks that do not exist, or all ranks; or as elastic.
        NoMajority, Excluded
            A rank was lost, and this rank must not go on. If it may go on, the call returns True.
        """
        self._require_joinable("admit")
        if self._joining:
            try:
                self.barrier()  # the members are still making the next generation
                self._activate()
            except (PeerLost, PeerTimeout):
                self._leave_calls()
                raise
            self._joining = False
            return True
        left = sorted(set(leaving))
        if any(not isinstance(r, int) or not 0 <= r < self.size for r in left) or len(left) >= self.size:
            raise InvalidArgument(
                f"admit: leaving is {left}; expected some of the ranks 0..{self.size - 1}",
                op="admit",
                rank=self.rank,
            )
        try:
            return self._admit(left)
        except (PeerLost, PeerTimeout):
            self.recover()
            return True

    def _require_joinable(self, op: str) -> None:
        self._require_lasting(op)
        if not hasattr(self.bootstrap, "root"):
            raise InvalidArgument(
                f"{op}: the communicator was made with a single rank, which accepts no connections; expected a "
                "communicator of at least two ranks",
                op=op,
                rank=self.rank,
            )

    def _admit(self, leaving: list[int]) -> bool:
        if self._waiting is None:
            self._waiting = joining.Waiting(self.bootstrap.root()[0])
        state = "none" if self._next is None else self._next.state
        said = self.collective.exchange([state, self._waiting.contacts(), _host(), leaving], "admit")
        states = {s[0] for s in said}
        if states == {"none"}:
            if any(s[1] or s[3] for s in said):
                self._start(said)
        elif states == {"ready"}:
            self._go_on()  # if a rank was lost, some ranks may not know that all are ready
            return True
        elif "making" not in states and self._next is not None:
            self._next.drop()
            self._next = None
        return False

    def _start(self, said: list[Any]) -> None:
        """Begin to make the next generation from the ranks that stay and the new ranks that all of them know."""
        leaving = said[0][3]
        hosts = [s[2] for s in said]
        homes = self._homes or [r // self.ranks_per_node for r in range(self.size)]
        most = max(*self.members, self._most)
        entries = [Entry(homes[r], self.members[r], r, None) for r in range(self.size) if r not in leaving]
        for joiner in [contact for s in said for contact in s[1]]:
            here = {h for h, host in zip(homes, hosts, strict=True) if host == joiner["host"]}
            taken = {h: sum(entry.home == h for entry in entries) for h in here}
            home = (
                min(taken, key=lambda h: (taken[h], h)) if taken else max(entry.home for entry in entries) + 1
            )
            most += 1
            entries.append(Entry(home, most, -1, joiner))
        entries.sort(key=lambda entry: entry[:2])
        per_node = largest_nodes([entry.home for entry in entries])
        if not leaving and per_node < self.ranks_per_node:
            return  # the new ranks wait for more of them
        self._most = most
        coming = Next([e.rank for e in entries], [e.uid for e in entries], [e.home for e in entries])
        self._next = coming
        if self.rank not in coming.ranks:
            return  # this rank leaves
        mesh = joining.wider(
            self.bootstrap, coming.ranks, [e.joiner and e.joiner["contact"] for e in entries]
        )
        renewals = {n: renew for n, renew in buffers_of(self).items() if renew.state >= 0}
        plans = {n: renew.plan(coming.uids, len(entries) // per_node) for n, renew in renewals.items()}
        told = {
            "ranks_per_node": per_node,
            "timeout": self.timeout,
            "patience": self.patience,
            "generation": self.generation + 1,
            "uids": coming.uids,
            "homes": coming.homes,
            "buffers": [renewals[n].describe(plan) for n, plan in plans.items()],
        }
        for position, entry in enumerate(entries):
            if entry.joiner is not None and self._waiting is not None:
                self._waiting.invite(entry.joiner, {**told, **mesh.invitation(position)})

        def make(coming: Next) -> None:
            coming.comm = type(self)(  # type: ignore[call-arg]
                mesh.connect(), ranks_per_node=per_node, timeout=self.timeout, patience=self.patience
            )
            for n, plan in plans.items():
                coming.buffers.append((n, renewals[n].make(coming.comm, plan)))
            coming.comm.barrier()  # until the new ranks have loaded their weights

        coming.run(make)

    def _change(self) -> None:
        """Become the next generation, which is ready on all ranks."""
        coming: Any = self._next
        self._next = None
        if self.rank not in coming.ranks:
            self.order.close("is closed: this rank has left")
            self._release()
            return
        retired, mesh = self.native, self.bootstrap
        theirs = vars(coming.comm)
        for name in ("rank", "size", "ranks_per_node", "num_nodes", "node", "local_rank", "rail"):
            vars(self)[name] = theirs[name]
        self._use(coming.comm.bootstrap, coming.comm.native)
        self.windows = coming.comm.windows
        self._uids, self._homes = coming.uids, coming.homes
        self.generation += 1
        renewals = buffers_of(self)
        for n, fresh in coming.buffers:
            self._later(renewals[n].become(fresh))
        renumber(self, [n for n, _ in coming.buffers])
        self._later(retired.release)
        mesh.close()
        self._activate()

    def _ready_for(self) -> Any:
        """Return the identity of the next generation if it is ready on this rank, else None."""
        return None if self._next is None or self._next.state != "ready" else self._next.uids

    def _end_growth(self) -> None:
        """Refuse new ranks, and release everything of earlier and next generations."""
        self._finish_tidying()
        if self._next is not None:
            self._next.drop()
            self._next = None
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def _activate(self) -> None:
        self._steps = max(self.collective.exchange(self._steps, "admit"))
