"""Caches of this machine: their size, and eviction of their contents between measurements."""

from __future__ import annotations

from pathlib import Path

from moecomm._native import core

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_bytes(root="/sys/devices/system/cpu"):
    """Total bytes of the last-level caches of this machine, or 0 if unknown."""
    found = {}  # {(level, CPUs that share the cache): bytes}
    for folder in Path(root).glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, kind, size, shared = (
                (folder / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found[int(level), shared] = int(size[:-1]) * _UNITS[size[-1]]
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


class Eviction:
    """Reads more memory than the last-level caches hold, like the weights of a model between two calls.

    Each rank of a host reads a share.
    """

    def __init__(self, ranks):
        self.nbytes = int(1.25 * (last_level_bytes() or 64 << 20))
        self._memory = core.RateProbe(max(self.nbytes // ranks, 1 << 20))

    def __call__(self):
        """Read this rank's share."""
        self._memory.read()
