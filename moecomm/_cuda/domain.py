"""The native Domain of the cuda world, on the current stream.

write and signal are enqueued. read, wait, fence and the collective verbs wait on the host, so that they raise their own
failures.
"""

from __future__ import annotations

from typing import Any

import torch

from . import cuda, nccl
from ..errors import InvalidArgument
from .streams import OnStreams


class NativeDomain(OnStreams):
    """As core.Domain of the cpu world, on streams."""

    def __init__(self, comm: Any, plan: Any, size: int, counters: Any) -> None:
        super().__init__(comm, cuda.native().Failure)
        self._domain = cuda.native().Domain(
            (comm.rank, comm.size, comm.ranks_per_node),
            comm.cuda.peer_access,
            comm.gpu_calls.native,
            comm.gpu,
            size,
            counters,
            plan.spread(),
            plan.stages,
            comm.timeout,
        )
        for name in ("contact", "memory", "counter", "from_window_only"):
            setattr(self, name, getattr(self._domain, name))

    @property
    def heap(self) -> Any:
        """As in the cpu world."""
        return self._domain.heap

    def connect(self, contacts: Any) -> None:
        """As in the cpu world. With NCCL it waits for every rank."""
        timeout, rank = self._bounds
        nccl.bounded(lambda: self._domain.connect(contacts), timeout, what="connecting a domain", rank=rank)

    def finish_connect(self) -> None:
        """Do nothing: connect has completed the connection."""

    def release(self) -> None:
        """As NativeBuffer.release."""
        self._calls.after_call(self._domain.release)

    def beside(self, work: Any) -> Any:
        """Wrap work for the progress thread: it runs on the communicator's stream, after all work enqueued so far."""
        comm: Any = self._comm
        own, ready = comm.cuda.stream, torch.cuda.current_stream(self._device).record_event()

        def on_its_stream() -> Any:
            with torch.cuda.device(self._device), torch.cuda.stream(own):
                own.wait_event(ready)
                result = work()
                own.synchronize()
                return result

        return on_its_stream

    def _run(self, op: str, call: Any, *args: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            raise InvalidArgument(
                f"{op}: a CUDA graph is captured, but {op} waits on the host, which a replay does not do; expected the "
                "call outside the capture",
                op=op,
                rank=self._comm.rank,
            )
        return self.enqueue(op, None, call, *args)

    def write(self, rank: int, rows: Any, counter: int) -> Any:
        """As in the cpu world, but only enqueued."""
        return self._run("write", self._domain.write, rank, rows, counter)

    def read(self, rank: int, rows: Any) -> Any:
        """As in the cpu world."""
        return self._run("read", self._domain.read, rank, rows)

    def signal(self, rank: int, counter: int, add: int) -> Any:
        """As in the cpu world, but only enqueued."""
        return self._run("signal", self._domain.signal, rank, counter, add)

    def wait(self, source: int, counter: int, at_least: int) -> Any:
        """As in the cpu world."""
        return self._run("wait", self._domain.wait, source, counter, at_least)

    def fence(self) -> Any:
        """As in the cpu world."""
        return self._run("fence", self._domain.fence)

    def multicast(self, calls: Any, why: str) -> Any:
        """As in the cpu world."""
        return self._run("multicast", self._domain.multicast, calls, why)

    def reduce(self, calls: Any, why: str) -> Any:
        """As in the cpu world."""
        return self._run("reduce", self._domain.reduce, calls, why)

    def take_counters(self) -> Any:
        """As in the cpu world."""
        with self._calls.call("stats"):
            return self._domain.take_counters()
