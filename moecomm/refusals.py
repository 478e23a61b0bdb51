"""Reports refusals to the peers: a rank that raises before a collective call has begun still takes part in the call.

If a rank refused its arguments and left the call, its next call would meet the present call of its peers, and they
would return rows of another step. So the rank reports the refusal in the same call. It raises its own error, all
other ranks raise an InvalidArgument that names it, and all ranks are in step for the next call.

A refusal is not reported if no peer waits for it: if the Buffer or Communicator is closed, in a world of one rank, in
calls that are traced or captured into a CUDA graph, in calls from code that runs inside another call, and in a
decode_combine without an open step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import threading

import torch
from torch._guards import detect_fake_mode

from .errors import InvalidArgument

if TYPE_CHECKING:
    from .backend import Backend
    from .communicator import Communicator

_Result = TypeVar("_Result")
_ARGUMENTS, _ERROR, GROW = 1, 3, 4  # of Why in csrc/base/types.hpp
_IN_STEP = ("refused", "mismatch", "capacity")  # codes after which all ranks are in step
_here = threading.local()  # .part: the innermost call that this thread is in


class Part:
    """Context of this rank's part in one collective call. Reports an exception before the native call to the peers."""

    __slots__ = ("backend", "verb", "handle", "made", "chosen", "outer")

    def __init__(self, backend: Backend, verb: str, handle: Any = None) -> None:
        self.backend, self.verb, self.handle, self.made, self.chosen = backend, verb, handle, False, False

    def __enter__(self) -> Part:
        self.outer = getattr(_here, "part", None)
        _here.part = self
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        _here.part = self.outer
        if error is not None and not self.made:
            _report(self, error)

    def native(self) -> tuple[Any, str, int]:
        """(native object, verb, epoch of a decode step) of the call in which the peers are."""
        b = self.backend
        choosing = b.router is not None and b.router.logical_experts > 0 and not self.chosen
        if choosing and (
            self.verb == "decode_dispatch"
            or (self.verb == "dispatch" and b.beside is not None and self.handle is None)
        ):
            return b.choosing, "choose", 0
        if not self.verb.startswith("decode"):
            return b.memory.of(self.handle), self.verb, 0
        decode = b.memory.decode.native
        epoch = self.handle.epoch if getattr(self.handle, "decode", None) is decode else decode.epoch
        return decode, self.verb, epoch


def take_part(backend: Backend, verb: str, handle: Any, call: Callable[..., _Result], *args: Any) -> _Result:
    """Call call(*args) as this rank's Part in a collective call."""
    with Part(backend, verb, handle):
        return call(*args)


def report(backend: Backend, verb: str, handle: Any, error: BaseException) -> None:
    """Report an error to the ranks that are in a call, in place of this rank's part in it."""
    _report(Part(backend, verb, handle), error)


def made(backend: Backend) -> None:
    """Mark the start of the native call, which reports its own failures, in this thread's Parts of the Backend."""
    part = getattr(_here, "part", None)
    while part is not None:
        if part.backend is backend:
            part.made = True
        part = part.outer


def chosen(backend: Backend) -> None:
    """Note that the exchange for the choice of replicas is complete, and the call itself comes next."""
    part = getattr(_here, "part", None)
    while part is not None:
        if part.backend is backend:
            part.made, part.chosen = False, True
        part = part.outer


def _report(part: Part, error: BaseException) -> None:
    memory = part.backend.memory
    comm = memory.comm
    if (
        comm.size == 1
        or memory.closed
        or memory.native is None  # no call has made the memory yet
        or comm.order.closed
        or _is_pretended(comm)
        or comm.native.running() is not None
    ):
        return
    made(part.backend)  # Parts around this one must not report it again
    try:
        comm.order.settle()  # earlier asynchronous calls come first
        native, verb, epoch = part.native()
        why = _ARGUMENTS if isinstance(error, InvalidArgument) else _ERROR
        failure = native.refuse(verb, epoch, why)
    except Exception as other:  # raise the first error, which names the cause
        _note(error, f"The refusal could not be reported to the other ranks: {other}")
        return
    if failure is None or failure.code in _IN_STEP:
        return
    if failure.code == "out_of_step" and failure.peer == comm.rank:
        _note(
            error,
            "No other rank's host waits for this call: they have gone on. The communicator cannot be used any more.",
        )
    else:
        who = f", rank {failure.peer}" if failure.peer >= 0 else ""
        _note(
            error,
            f"The refusal could not be reported to all other ranks (phase {failure.phase}: {failure.code}{who}); the "
            "communicator cannot be used any more.",
        )


def _note(error: BaseException, text: str) -> None:
    if hasattr(error, "add_note"):  # since Python 3.11
        error.add_note(text)


def _is_pretended(comm: Communicator) -> bool:
    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return True
    return comm.gpu is not None and torch.cuda.is_current_stream_capturing()
