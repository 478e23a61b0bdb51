"""Renewal: a Buffer becomes the Buffer of the next generation of its communicator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import contextlib
import threading
import weakref
from dataclasses import dataclass, field

import torch

from ..ops import name_backend

# communicator -> weak references to its Buffers in the order of their construction, which is the same on all ranks
_made: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()
_TOLD = ("hidden", "num_experts", "top_k", "max_tokens", "replicas", "activate", "renormalize", "channels")
_here = threading.local()  # .quiet: this thread makes the next generation of a Buffer, which is not listed
_placement_type: Any = None


def set_placement_type(kind: Any) -> None:
    """Set the class of placements. The module of Placement calls this, because it imports this one."""
    global _placement_type
    _placement_type = kind


def buffers_of(comm: Any) -> dict[int, Renewal]:
    """Return {number: Renewal} of the living Buffers of a communicator. The numbers are the same on all ranks."""
    found = {number: buffer() for number, buffer in enumerate(_made.get(comm, ()))}
    return {number: Renewal(buffer) for number, buffer in found.items() if buffer is not None}


def renumber(comm: Any, numbers: list[int]) -> None:
    """Keep only these Buffers in the list, numbered from 0 as on a rank that has joined."""
    _made[comm] = [_made[comm][n] for n in numbers]


def arguments_from(said: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of Buffer from the description of a member's Buffer (Renewal.describe)."""
    if said.get("placement") is None:
        return said
    table, *rest = said["placement"]
    rows = torch.tensor(table, dtype=torch.int64, device="cpu")
    placement = _placement_type(rows, *rest[:-1], partial=rest[-1])
    return {**said, "placement": placement, "dtype": getattr(torch, said["dtype"])}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    _here.quiet = True
    try:
        yield
    finally:
        _here.quiet = False


@dataclass
class Origin:
    """The arguments of a Buffer. .kwargs: all but comm. .uids: the members of its generation by rank."""

    kwargs: dict[str, Any]
    uids: list[int] = field(default_factory=list)


def enroll(buffer: Any) -> None:
    """Add a Buffer to the list of its communicator. Its .comm and .origin are set."""
    comm = buffer.comm
    buffer.origin.uids = list(comm.members)
    if not getattr(_here, "quiet", False):
        _made.setdefault(comm, []).append(weakref.ref(buffer))


class Renewal:
    """Makes a Buffer the Buffer of the next generation of its communicator."""

    def __init__(self, buffer: Any) -> None:
        self._buffer, self._origin = buffer, buffer.origin
        self._backend, self._memory = buffer.backend, buffer.backend.memory

    @property
    def state(self) -> int:
        """-1: closed; 0: without memory so far; 1: with memory."""
        return -1 if self._memory.closed else int(self._memory.native is not None)

    def plan(self, uids: list[int], nodes: int) -> dict[str, Any]:
        """Return the keyword arguments of the next Buffer. uids: its members by rank; nodes: their number of nodes."""
        memory, kwargs = self._memory, self._origin.kwargs
        again = dict(kwargs)
        if memory.native is None:
            return again  # the first call in the next generation makes the memory
        placement = self._placement_for(uids, nodes)
        again |= {
            "hidden": memory.hidden,
            "top_k": memory.top_k,
            "max_tokens": memory.max_tokens,
            "dtype": memory.dtype,
            "num_experts": placement.num_experts,
            "placement": placement,
            "record": None,
            "decode": False,
        }
        if kwargs["placement"] is None:
            again["replicas"] = "local"  # experts have one replica
        return again

    def describe(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Return a plan as values for ranks that join (see arguments_from)."""
        p = plan.get("placement")
        if p is None:  # the first call determines the shape
            return {name: plan[name] for name in _TOLD if name in plan}
        said = {name: plan[name] for name in _TOLD if name in plan}
        said["placement"] = [
            p.physical_to_logical.tolist(),
            p.num_experts,
            p.num_ranks,
            p.num_nodes,
            p.version,
            p.partial,
        ]
        return {**said, "dtype": str(plan["dtype"]).removeprefix("torch.")}

    def make(self, comm: Any, plan: dict[str, Any]) -> Any:
        """Make a Buffer of the next generation. Collective."""
        with _quietly():
            return type(self._buffer)(comm, **plan)

    def become(self, fresh: Any) -> Callable[[], None]:
        """Give the Buffer the parts of `fresh`. Its communicator, name and hooks stay.

        Return a function that releases the earlier memory.
        """
        buffer, before, after = self._buffer, self._backend, fresh.backend
        after.memory.comm = buffer.comm
        if after.router is not None:
            after.router.comm = buffer.comm
        after.hooks = before.hooks
        name_backend(after, before.name)
        after.memory.trace(self._memory.tracing)
        vars(buffer).update(vars(fresh), comm=buffer.comm, origin=self._origin)
        self._origin.uids = list(buffer.comm.members)
        release: Callable[[], None] = before.retire()
        return release

    def _placement_for(self, uids: list[int], nodes: int) -> Any:
        """Return a placement: former ranks keep their slots, and new ranks get the experts with the fewest replicas."""
        before, router = self._origin.uids, self._backend.router
        if router is not None:
            now = router.placement
        else:
            experts = self._memory.num_experts
            table = torch.arange(experts, dtype=torch.int64, device="cpu")[None]
            now = _placement_type(table, experts, len(before))
        rows = now.physical_to_logical.view(now.num_layers, now.num_ranks, -1)
        stay = rows[:, [before.index(uid) for uid in uids if uid in before]]
        count = torch.zeros((now.num_layers, now.num_experts), dtype=torch.int64, device="cpu")
        count.scatter_add_(1, stay.flatten(1), torch.ones_like(stay.flatten(1)))
        parts = []
        for uid in uids:
            if uid in before:
                parts.append(rows[:, before.index(uid)])
            else:
                parts.append(count.argsort(dim=1, stable=True)[:, : rows.shape[2]].sort(1).values)
                count.scatter_add_(1, parts[-1], torch.ones_like(parts[-1]))
        table = torch.stack(parts, 1).flatten(1)
        partial = bool((count == 0).any())
        return _placement_type(table, now.num_experts, len(uids), nodes, now.version, partial=partial)
