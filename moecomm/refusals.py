"""How a refusal reaches the peers: a rank whose call ends by an exception before it has begun takes part in it all the same.

Calls are collective. A rank that refuses its arguments, say, and goes on would have its next call meet its peers' present one,
and rows of another step would be returned. So it tells them, in that very call: the refusing rank raises what it found, every
other rank an InvalidArgument that names it, and all are in step for the next call.

Not told, because nobody waits for it: what a closed Buffer or Communicator refuses, a world of one rank, calls that are traced
or captured into a CUDA graph, calls from code that runs inside another call, and a decode_combine where no step is open for one.
"""

from __future__ import annotations

import threading

import torch
from torch._guards import detect_fake_mode

from ._native import core
from .errors import InvalidArgument

_ARGUMENTS, _ERROR = 1, 3  # of Why in csrc/base/types.hpp
_here = threading.local()  # .part: the innermost call that this thread is in


class Part:
    """This rank's part in one collective call, as a context: an exception before the native call is told to the peers."""

    __slots__ = ("buffer", "verb", "handle", "made", "chosen", "outer")

    def __init__(self, buffer, verb, handle=None):
        self.buffer, self.verb, self.handle, self.made, self.chosen = buffer, verb, handle, False, False

    def __enter__(self):
        self.outer = getattr(_here, "part", None)
        _here.part = self
        return self

    def __exit__(self, kind, error, trace):
        _here.part = self.outer
        if error is not None and not self.made:
            _tell(self, error)
        return False

    def native(self):
        """(the native object, verb, epoch of a decode step) of the call that peers are in."""
        b = self.buffer
        choosing = b._replica_router is not None and b._replica_router.logical_experts > 0 and not self.chosen
        if choosing and (
            self.verb == "decode_dispatch"
            or (self.verb == "dispatch" and b._host_router_buffer is not None and self.handle is None)
        ):
            return b._choosing_native, "choose", 0
        if not self.verb.startswith("decode"):
            return b._native, self.verb, 0
        decode = b._decode.native
        epoch = self.handle.epoch if getattr(self.handle, "decode", None) is decode else decode.epoch
        return decode, self.verb, epoch


def take_part(buffer, verb, handle, call, *args):
    """call(*args) as this rank's Part in a collective call."""
    with Part(buffer, verb, handle):
        return call(*args)


def made(buffer):
    """The native call of this thread's parts in calls of this Buffer comes now: from here on its outcome is every rank's."""
    part = getattr(_here, "part", None)
    while part is not None:
        if part.buffer is buffer:
            part.made = True
        part = part.outer


def chosen(buffer):
    """The exchange by which a call chooses replicas is over; the call itself comes next."""
    part = getattr(_here, "part", None)
    while part is not None:
        if part.buffer is buffer:
            part.made, part.chosen = False, True
        part = part.outer


def _tell(part, error):
    buffer, comm = part.buffer, part.buffer.comm
    if (
        comm.size == 1
        or buffer._closed
        or comm._closed
        or _is_pretended(comm)
        or comm._native.running() is not None
    ):
        return
    made(buffer)  # calls around this one do not tell it again
    try:
        comm._settle()  # in order with the asynchronous calls before it
        native, verb, epoch = part.native()
        why = _ARGUMENTS if isinstance(error, InvalidArgument) else _ERROR
        failure = (
            core.refuse(native, verb, why)
            if isinstance(native, core.Buffer)
            else native.refuse(verb, epoch, why)
        )
    except Exception as other:  # the first error says what is wrong
        _note(error, f"The other ranks could not be told: {other}")
        return
    if failure is not None:
        who = f", rank {failure.peer}" if failure.peer >= 0 else ""
        _note(
            error,
            f"Not all other ranks could be told (phase {failure.phase}: {failure.code}{who}); the communicator cannot be used any more.",
        )


def _note(error, text):
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(text)


def _is_pretended(comm):
    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return True
    return comm._gpu is not None and torch.cuda.is_current_stream_capturing()
