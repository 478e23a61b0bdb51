"""KV hand-over: prefill ranks write the rows of a prompt directly into a slot of a decode rank's cache.

The cache of a decode rank is memory of the domain, so it needs no copy. After the rows the prefill rank sends a
signal: each rank has one counter per slot and source. The router counts the prompts that each source has written to
each slot, and a decode rank waits for this number before it reads.
"""

from __future__ import annotations

from moecomm.fabric import Domain


class HandOver:
    """Memory of all ranks that prefill ranks write by one-sided requests. Construction is collective.

    Parameters
    ----------
    link : Communicator
        All ranks: those of the decode unit, then those of the prefill unit.
    decode_ranks : int
        Number of decode ranks.
    shape : tuple
        Shape of a decode rank's cache: layers, slots, tokens, elements of a row. Prefill ranks use their memory only
        to name offsets.
    dtype : torch.dtype
    """

    def __init__(self, link, decode_ranks, shape, dtype):
        size = dtype.itemsize
        for n in shape:
            size *= n
        self.domain, self._first_source = Domain(link, size, counters=shape[1]), decode_ranks
        self.memory = self.domain.tensor(shape, dtype)
        if link.rank < decode_ranks:
            self.memory.zero_()
        link.barrier()

    def write(self, rank, slot, rows):
        """Write rows [layers, S, row] to a slot of a decode rank with one request, and send the signal."""
        layers, tokens = rows.shape[:2]
        places = [self.memory[layer, slot, :tokens] for layer in range(layers)]
        self.domain.write(rank, places, list(rows))
        self.domain.signal(rank, slot)

    def wait(self, source, slot, count):
        """Wait until a prefill rank has written `count` prompts to a slot of this rank.

        Raises
        ------
        PeerLost, PeerTimeout
            The prefill rank has died, or has not written them within the timeout.
        """
        self.domain.wait(self._first_source + source, slot, count)

    def take_bytes(self):
        """Bytes that this rank has written over each hop since the last call: {"node": ..., "rail": ...}."""
        stats = self.domain.stats()
        return {hop: stats[hop]["physical_bytes"] for hop in ("node", "rail")}

    def close(self):
        """Release the memory. Local."""
        self.domain.close()
