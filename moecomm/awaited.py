"""What Communicator says of calls that have ended: its part that waits for them."""

from __future__ import annotations

from typing import Any

from .errors import raise_failure


class Awaited:
    """Communicator.barrier and synchronize."""

    rank: int
    gpu_calls: Any
    native: Any
    cuda: Any
    order: Any
    collective: Any

    def barrier(self) -> None:
        """Wait until all ranks have called barrier.

        Raises
        ------
        PeerTimeout, PeerLost
            A rank does not call it.
        """
        self.order.require_open("barrier")
        self._look("barrier")
        self.collective.exchange(None, "barrier")

    def synchronize(self) -> None:
        """Wait until all calls of this rank have ended, and raise what has become of them. Local.

        What a kernel of the cuda world finds is raised here, or by the next call. In the cpu world this waits for
        asynchronous calls, and Pending.wait raises what they raise.

        Raises
        ------
        InvalidArgument
            The communicator is closed, or a CUDA graph is captured on the current stream.
        CapacityExceeded, ConfigMismatch, PeerTimeout, PeerLost, CorruptRow
            As the call that failed would raise it.
        """
        self.order.require_open("synchronize")
        self.order.settle()
        if self.gpu_calls is not None:
            self.gpu_calls.wait(self.cuda.latest[1])
        self._look("synchronize")
        if self.cuda is not None:
            for memory in list(self.cuda.buffers):
                if hasattr(memory, "raise_late"):  # a Domain raises in its own calls
                    memory.raise_late()

    def _look(self, op: str) -> None:
        """Raise what has ended the communicator, if that is known."""
        calls = self.gpu_calls
        broken = self.native.broken() if calls is None else calls.broken(calls.latest_apart())
        if broken is not None:
            raise_failure(broken, op=op, rank=self.rank)
