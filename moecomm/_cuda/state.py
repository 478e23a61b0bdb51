"""The state of a communicator in the cuda world."""

from __future__ import annotations

import weakref

import torch


class CudaState:
    """What the calls of one communicator on GPUs share.

    .peer_access: how its ranks reach each other's windows. .latest: (stream, event) of the latest call. .buffers: its memory
    on GPUs. .gpu_name: the UUID of its GPU, once a buffer was made.
    """

    def __init__(self, peer_access, device):
        self.peer_access, self._device = peer_access, device
        self.latest = None, None
        self.buffers = weakref.WeakSet()
        self.gpu_name = None
        self._stream = None

    @property
    def stream(self):
        """The stream for asynchronous calls."""
        if self._stream is None:
            # With a high priority: its blocks start before those of a long kernel that has not started all of its own.
            self._stream = torch.cuda.Stream(self._device, priority=-1)
        return self._stream
