"""Calls of the cuda world on streams: the current stream of the caller, or the communicator's stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .exclusive import Exclusive

if TYPE_CHECKING:
    from ..communicator import Communicator


class OnStreams:
    """Enqueues native calls of a communicator on the current stream, one at a time, in the order of the calls.

    failure: the Failure class of the extension.
    """

    def __init__(self, comm: Communicator, failure: Any) -> None:
        self._comm, self._device, self._failure = comm, comm.device, failure
        self._bounds = comm.timeout, comm.rank
        self._calls = Exclusive(comm.rank)

    def stream(self) -> Any:
        """Return the current stream as a pointer for native code."""
        return torch.cuda.current_stream(self._device).cuda_stream

    def enqueue(self, op: str, made_on: Any, call: Any, *args: Any) -> Any:
        """Return call(*args, stream) on the current stream, after the earlier calls of the communicator.

        Returns the final Failure instead if the communicator is broken, or if this call has failed already. made_on:
        the native object that knows failures of this call, or None if the call returns them.
        """
        with self._calls.call(op):
            return self._enqueue(self._comm, made_on, call, *args)

    def _enqueue(self, comm: Any, made_on: Any, call: Any, *args: Any) -> Any:
        broken = comm.gpu_calls.broken(getattr(call, "__self__", None))
        if broken is not None:
            return broken
        stream = torch.cuda.current_stream(self._device)
        capturing = torch.cuda.is_current_stream_capturing()
        before, done = comm.cuda.latest
        if before is not None and stream != before and not capturing:
            # Two concurrent kernels of a rank could occupy multiprocessors that the other one, or a peer's, needs.
            stream.wait_event(done)
        result = call(*args, stream.cuda_stream)
        if made_on is not None and not isinstance(result, self._failure):
            result = made_on.ended() or result
        if isinstance(result, self._failure):
            comm.gpu_calls.note(result)
        if not capturing:
            comm.cuda.latest = stream, stream.record_event()
        return result


class Pending:
    """An asynchronous call on the communicator's stream. Keeps the inputs alive until wait().

    .event: CUDA event after the call. A stream that reads the result must wait for it; wait() does so for the current
    stream.
    """

    span = None

    def __init__(self, comm: Any, work: Any, keep: Any, then: Any = None) -> None:
        own = comm.cuda.stream
        own.wait_stream(torch.cuda.current_stream(comm.device))
        with torch.cuda.stream(own):
            self._result = work()
            self.event = own.record_event()
        self._comm, self._device, self._keep, self._then = comm, comm.device, keep, then

    def wait(self) -> Any:
        """Make the current stream wait for the call, and return its result. The host does not wait.

        Raises
        ------
        InvalidArgument
            This process is a forked child.
        MoecommError
            The communicator is known to be broken. Communicator.synchronize also waits for unknown failures.
        """
        self._comm.order.require_here("wait")
        self._comm.gpu_calls.look("wait")
        torch.cuda.current_stream(self._device).wait_event(self.event)
        then, self._keep, self._then = self._then, None, None
        if then is not None:
            then(self._result)
        return self._result

    def done(self) -> Any:
        """Whether the GPU has completed the call."""
        return self.event.query()


class PendingDispatch(Pending):
    """A dispatch on the communicator's own stream. The host knows its counts; the rows are in flight."""

    def __init__(self, comm: Any, work: Any, keep: Any, then: Any, first: Any) -> None:
        super().__init__(comm, work, keep, then)
        self._first = first

    def wait_counts(self) -> Any:
        """As results.PendingDispatch.wait_counts: the host has waited for the counts, unless there is a capacity.

        Raises
        ------
        InvalidArgument, MoecommError
            As wait.
        """
        self._comm.order.require_here("wait_counts")
        self._comm.gpu_calls.look("wait_counts")
        early = self._first.wait()
        if early is None or early.handle.capacity is not None or early.handle.has_counts:
            # The native call has not told the host, or an operator has copied the counts behind the call.
            torch.cuda.current_stream(self._device).wait_event(self.event)
        return self._result if early is None else early
