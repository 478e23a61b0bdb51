"""Tickets: what a handle tensor of an operator stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ctypes
import itertools
import weakref

import torch

from .errors import InvalidArgument

if TYPE_CHECKING:
    from .backend import Backend

_numbers = itertools.count(1)
_tickets: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()


class Ticket(ctypes.Structure):
    """The memory of a handle tensor: a number, and everything that combine needs.

    A tensor made by torch.frombuffer keeps its exporter alive. So a plan lives exactly as long as a tensor with this
    storage, which autograd, a checkpoint or a compiled graph may keep.
    """

    _fields_ = [("number", ctypes.c_int64)]

    def __init__(
        self, owner: Backend, layout: str, capacity: int | None, plan: Any, output: Any, native: Any
    ) -> None:
        super().__init__(next(_numbers))
        self.owner, self.layout, self.capacity = owner, layout, capacity
        self.plan, self.output, self.native = plan, output, native

    def tensor(self) -> torch.Tensor:
        """Return int64 [1] on the host. Only this call assigns the number: most handles never become a tensor."""
        _tickets[self.number] = self
        return torch.frombuffer(self, dtype=torch.int64)


def ticket_of(handle: torch.Tensor) -> Ticket:
    """Return the Ticket of an int64 tensor [1].

    Raises
    ------
    InvalidArgument
        The dispatch is unknown: the tensor is a copy, and the original is freed (for example by hooks that copy saved
        tensors in a compiled graph).
    """
    found = ticket_with(int(handle))
    if found is None:
        raise InvalidArgument(
            f"handle has number {int(handle)}, which is not (or no longer) a handle of a dispatch; keep the tensor "
            "that dispatch returned, not a copy of it",
            op="ops",
        )
    return found


def ticket_with(number: int) -> Ticket | None:
    """Return the Ticket with this number, if it lives."""
    return _tickets.get(number)
