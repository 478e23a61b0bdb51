"""The state of a communicator in the cuda world."""

from __future__ import annotations

from typing import Any

import weakref

import torch


class CudaState:
    """What the calls of one communicator on GPUs share.

    .peer_access: how its ranks reach each other's windows. .latest: (stream, event) of the latest call. .buffers: its
    memory on GPUs. .gpu_name: the UUID of its GPU, once a buffer was made.
    """

    def __init__(self, peer_access: Any, device: torch.device) -> None:
        self.peer_access, self._device = peer_access, device
        self.latest: tuple[Any, Any] = None, None
        self.buffers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.gpu_name: str | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream for asynchronous calls."""
        if self._stream is None:
            # With a high priority: its blocks start before those of a long kernel that has not started all of its own.
            self._stream = torch.cuda.Stream(self._device, priority=-1)
        return self._stream
