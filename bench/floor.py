"""The floor: minimum time of this machine for the bytes of a call, measured on the same amount of memory.

Two measurements are interleaved with the calls, with all ranks active at once. The floor is the smaller one, so no
call can be faster by more than the noise:

    bare loop  the row copies and sums of the case, with all addresses computed before (bench/bare.py)
    rates      bytes to write / rate of streaming stores + bytes to read / rate of loads. This also holds if the row
               kernels of moecomm are slow:

        dispatch  reads x and the rows from the rail; writes the rows to the rail, and every row once per destination
                  rank (expert layout: reads and writes again for every further expert of that rank)
        combine   reads every expert row and the rows from the rail; writes the rows to the rail, and y
"""

from __future__ import annotations

import numpy as np

from moecomm._native import core

from .bare import Bare

OPS = ("dispatch", "combine")


class Floor:
    """The two measurements of one case."""

    def __init__(self, world, case):
        self._world, self._case = world, case
        self._bare, self._probe = Bare(world, case), None
        self._by_loop = {op: [] for op in OPS}
        self._by_rates = {op: [] for op in OPS}

    def measure(self, x, ids, weights, *, before=lambda: None):
        """Time the bare loop for one routing: (seconds of dispatch, seconds of combine).

        before : callable
            Called before each of the two, as before every call of a contender.
        """
        bare = self._bare
        bare.prepare(ids, weights)
        bare.poison(0.5)
        before()
        _, dispatched = self._world.timed(bare.dispatch, x)
        before()
        _, combined = self._world.timed(bare.combine)
        return dispatched, combined

    def rates(self, *, before=lambda: None):
        """Measure (write, read) rates in bytes/s over all ranks, on as much memory as dispatch writes."""
        if self._probe is None:
            self._probe = core.RateProbe(max(self._bare.nbytes, 1 << 20))
        total = sum(self._world.allgather(self._probe.nbytes))
        rates = []
        for work in (self._probe.write, self._probe.read):
            before()
            rates.append(total / self._world.timed(work)[1])
        return rates

    def keep(self, loop, rates, *, dispatch_stats, combine_stats, tokens):
        """Add the measurements of one iteration, with the bytes that moecomm counted in it."""
        x = tokens * self._case.row_bytes
        rail_out = dispatch_stats["rail"]["physical_bytes"]
        rail_back = combine_stats["rail"]["physical_bytes"]
        placed, read = dispatch_stats["node"]["logical_bytes"], combine_stats["node"]["logical_bytes"]
        again = dispatch_stats["replicated_rows"] * self._case.row_bytes
        mine = {
            "dispatch": (rail_out + placed + again, x + rail_out + again),
            "combine": (rail_back + x, read + rail_back),
        }
        everyone = self._world.allgather(mine)
        for op, seconds in zip(OPS, loop, strict=True):
            self._by_loop[op].append(seconds)
            moved = [sum(each[op][i] for each in everyone) for i in range(2)]
            self._by_rates[op].append(moved[0] / rates[0] + moved[1] / rates[1])

    def seconds(self):
        """{op: seconds}: the smaller of the two medians. A round trip is the sum."""
        floor = {
            op: min(float(np.median(self._by_loop[op])), float(np.median(self._by_rates[op]))) for op in OPS
        }
        return {**floor, "roundtrip": sum(floor.values())}

    def working_set(self):
        """Bytes that a dispatch writes, over all ranks."""
        return sum(self._world.allgather(self._bare.nbytes))
