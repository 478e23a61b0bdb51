"""The traffic floor: the time that memory alone would need for a call's bytes, at rates measured in the same run.

Bytes that must be written divided by the rate of streamed stores, plus bytes that must be read divided by the rate
of plain loads, both with all ranks at work at once.

    dispatch  reads x and what arrives over the rail; writes what leaves over the rail and every row once
              per destination rank (expert layout: reads and writes once more for every further expert there)
    combine   reads every expert row and what comes back over the rail; writes what goes back over the rail and y
"""

from __future__ import annotations

from moecomm._native import core

_PROBE_BYTES = 48 << 20  # in all, several times what the caches hold


class Floor:
    """Rates of this machine, and the floor of a case's ops."""

    def __init__(self, case, ranks):
        self._case = case
        self._probe = core.RateProbe(max(_PROBE_BYTES, (256 << 20) // ranks))

    def rates(self, world):
        """(write, read) in bytes per second over all ranks, measured now."""
        total = self._probe.nbytes * world.size
        return tuple(total / world.timed(work)[1] for work in (self._probe.write, self._probe.read))

    def seconds(self, rates, *, dispatch_stats, combine_stats, tokens, world):
        """{op: floor in seconds}."""
        x = tokens * self._case.row_bytes
        rail_out, rail_back = (
            dispatch_stats["rail"]["physical_bytes"],
            combine_stats["rail"]["physical_bytes"],
        )
        placed, read = dispatch_stats["node"]["logical_bytes"], combine_stats["node"]["logical_bytes"]
        again = dispatch_stats["replicated_rows"] * self._case.row_bytes
        mine = {
            "dispatch": (rail_out + placed + again, x + rail_out + again),
            "combine": (rail_back + x, read + rail_back),
        }
        everyone = world.allgather(mine)
        floor = {op: sum(sum(each[op][i] for each in everyone) / rates[i] for i in range(2)) for op in mine}
        return {**floor, "roundtrip": sum(floor.values())}
