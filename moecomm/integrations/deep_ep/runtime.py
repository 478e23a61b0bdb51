"""Runtime: the attribute Buffer.runtime."""

from __future__ import annotations

from typing import Any


class Runtime:
    """Information about ranks and nodes, as Buffer.runtime of deep_ep."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer

    def is_available(self) -> bool:
        """Return whether the buffer can be used."""
        return not self._buffer.destroyed

    def is_internode_available(self) -> bool:
        """Return whether there is more than one node."""
        return bool(self._buffer.world.num_nodes > 1)

    def get_num_rdma_ranks(self) -> Any:
        """Return the number of nodes."""
        return self._buffer.world.num_nodes

    def get_rdma_rank(self) -> Any:
        """Return the index of this rank's node."""
        return self._buffer.world.comm.node

    def get_local_device_id(self) -> Any:
        """Return the index of this rank's GPU, or 0 on the CPU."""
        return self._buffer.world.comm.device.index or 0
