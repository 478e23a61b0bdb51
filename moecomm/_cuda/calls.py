"""Results of a communicator's calls in the cuda world. Calls return before the GPU has completed them.

A kernel detects that a rank refuses a call, has made another call, or is late. The host gets this failure when it waits
(for the counts of a dispatch, or in Communicator.synchronize), or in the next call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import nccl
from ..errors import InvalidArgument, raise_failure

if TYPE_CHECKING:
    from ..communicator import Communicator


class Calls:
    """The failures that a communicator's kernels have found, and the board of its ranks. Construction is collective.

    On the board, each rank writes the call in which it waits. native: the extension module.
    """

    def __init__(self, native: Any, peer_access: Any, comm: Communicator) -> None:
        self.native = native.Calls((comm.rank, comm.size, comm.ranks_per_node), peer_access, comm.gpu)
        self.contact = self.native.contact
        self._rank, self._device, self._host, self._timeout = comm.rank, comm.gpu, comm.native, comm.timeout
        self._apart: list[Any] = []  # native decode memories that have gone on without lost ranks

    def connect(self, contacts: Any) -> None:
        """As for a buffer. With NCCL it waits for every rank."""
        nccl.bounded(
            lambda: self.native.connect(contacts), self._timeout, what="connecting the board", rank=self._rank
        )

    def note(self, failure: Any) -> None:
        """Note a failure. A final failure breaks the communicator."""
        self._host.note(failure)

    def go_on(self, decode: Any) -> None:
        """Let this decode memory go on after the end of the communicator: it has masked the lost ranks."""
        self._apart.append(decode.in_extension)

    def latest_apart(self) -> Any:
        """Return the native decode memory that has gone on last, or None. It reports the failures of later calls."""
        return self._apart[-1] if self._apart else None

    def broken(self, by: Any = None) -> Any:
        """Return the Failure that has broken the communicator, or None. Do not wait for the GPU.

        by: the native object of the call that asks.
        """
        broken = self._host.broken()
        if broken is None or any(by is apart for apart in self._apart):
            broken = self.native.fault()
            if broken is not None:
                self.note(broken)
        return broken

    def look(self, op: str) -> None:
        """Raise the failure that has broken the communicator, if one is known.

        Raises
        ------
        MoecommError
        """
        broken = self.broken()
        if broken is not None:
            raise_failure(broken, op=op, rank=self._rank)

    def wait(self, done: Any) -> None:
        """Wait until the GPU has completed all calls. done: the event after the latest call, or None.

        Raises
        ------
        InvalidArgument
            A CUDA graph is captured.
        """
        if torch.cuda.is_current_stream_capturing():
            raise InvalidArgument(
                "synchronize: a CUDA graph is captured on the current stream, so the host cannot wait; expected "
                "synchronize after the replay",
                op="synchronize",
                rank=self._rank,
            )
        if done is not None:
            done.synchronize()
        torch.cuda.current_stream(self._device).synchronize()  # for replayed graphs
