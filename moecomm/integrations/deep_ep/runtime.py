"""Buffer.runtime."""

from __future__ import annotations


class Runtime:
    """What callers ask of Buffer.runtime: which ranks and nodes there are."""

    def __init__(self, buffer):
        self._buffer = buffer

    def is_available(self):
        """Whether the buffer can be used."""
        return not self._buffer._destroyed

    def is_internode_available(self):
        """Whether there is more than one node."""
        return self._buffer._world.num_nodes > 1

    def get_num_rdma_ranks(self):
        """Nodes."""
        return self._buffer._world.num_nodes

    def get_rdma_rank(self):
        """This rank's node."""
        return self._buffer._world.comm.node

    def get_local_device_id(self):
        """Number of this rank's GPU; 0 on the CPU."""
        return self._buffer._world.comm.device.index or 0
