"""Runtime: the attribute Buffer.runtime."""

from __future__ import annotations


class Runtime:
    """Information about ranks and nodes, as Buffer.runtime of deep_ep."""

    def __init__(self, buffer):
        self._buffer = buffer

    def is_available(self):
        """Return whether the buffer can be used."""
        return not self._buffer.destroyed

    def is_internode_available(self):
        """Return whether there is more than one node."""
        return self._buffer.world.num_nodes > 1

    def get_num_rdma_ranks(self):
        """Return the number of nodes."""
        return self._buffer.world.num_nodes

    def get_rdma_rank(self):
        """Return the index of this rank's node."""
        return self._buffer.world.comm.node

    def get_local_device_id(self):
        """Return the index of this rank's GPU, or 0 on the CPU."""
        return self._buffer.world.comm.device.index or 0
