"""Statistics of requests and of the steps of a unit: times, load of each rank, placements."""

from __future__ import annotations

import time
from collections import Counter, deque

import numpy as np

KEPT = 4096  # number of the latest steps and requests in the percentiles


def percentiles(values, of=(50, 90, 99)):
    """{"p50": ..., ...} of a list. The values are None if it is empty."""
    return {f"p{q}": float(np.percentile(values, q)) if len(values) else None for q in of}


class Times:
    """Latencies of requests: time to the first token (TTFT), and mean time per further token of a request (TPOT)."""

    def __init__(self):
        self.ttft, self.tpot, self.tokens = deque(maxlen=KEPT), deque(maxlen=KEPT), 0
        self._recent = deque()  # (time, tokens) of the last 2 seconds

    def count(self, now, tokens):
        """Count generated tokens."""
        self.tokens += tokens
        self._recent.append((now, tokens))
        while self._recent and self._recent[0][0] < now - 2.0:
            self._recent.popleft()

    def finish(self, request):
        """Add the latencies of a complete request."""
        self.ttft.append(request.at[0] - request.came)
        if len(request.at) > 1:
            self.tpot.append((request.at[-1] - request.at[0]) / (len(request.at) - 1))

    def summary(self):
        """Statistics in types that JSON supports, in seconds."""
        now = time.perf_counter()
        recent = sum(n for at, n in self._recent if at > now - 2.0)
        return {
            "tokens": self.tokens,
            "tokens_per_second": recent / 2.0,
            "ttft": percentiles(self.ttft),
            "tpot": percentiles(self.tpot),
        }


class UnitLog:
    """Statistics of the steps of a unit, kept by the router. Also decides when the placement changes.

    A change of the placement takes three kinds of steps. In "plan", ranks sum their counts, compute a placement, and
    begin to move weights in the background. Then steps with the old placement follow. In "use", after all ranks have
    their new weights, all ranks change to the new placement.

    Parameters
    ----------
    rebalance_seconds : float
        Time between two changes. 0: never.
    """

    def __init__(self, rebalance_seconds):
        self._every, self._last = rebalance_seconds, time.monotonic()
        self._state = "rest"  # rest -> plan -> moving -> use -> rest
        self.seconds = {kind: deque(maxlen=KEPT) for kind in ("ordinary", "moving", "plan", "use")}
        self.steps, self.totals = 0, None  # totals: rows of each rank over all steps
        self.rows = deque(maxlen=KEPT)  # per step: rows of each rank
        self.sizes = deque(maxlen=KEPT)  # per step: sequences (decode) or tokens (prefill)
        self.placements = deque(maxlen=KEPT)  # {"version", "moved", "balancedness", "step"} of each placement
        self.accepted = self.drafted = 0
        self.kv_bytes = Counter()  # bytes that prefill ranks have written, by hop

    def placement_step(self):
        """The placement's part of the next step: None, "plan" or "use"."""
        if self._state == "rest" and self._every and time.monotonic() - self._last > self._every:
            self._state = "plan"
        return self._state if self._state in ("plan", "use") else None

    def add(self, begin, placement, answers, size):
        """Add one step.

        Parameters
        ----------
        begin : float
            time.perf_counter() at which the step was sent.
        placement : None, "plan" or "use"
        answers : list of dict
            Answers of the ranks: rows, version, moving (see PlacedExperts.moving), accepted, drafted, and plan (data
            of the placement that the step has begun to use).
        size : int
            Sequences or tokens.
        """
        seconds = time.perf_counter() - begin
        self.seconds[placement or ("moving" if self._state == "moving" else "ordinary")].append(seconds)
        rows = [a["rows"] for a in answers]
        self.rows.append(rows)
        self.totals = rows if self.totals is None else [a + b for a, b in zip(self.totals, rows, strict=True)]
        self.steps += 1
        self.sizes.append(size)
        self.accepted += sum(a.get("accepted", 0) for a in answers)
        for answer in answers:
            self.kv_bytes.update(answer.get("kv_bytes", {}))
        self.drafted += sum(a.get("drafted", 0) for a in answers)
        if placement == "use":
            self._state, self._last = "rest", time.monotonic()
            self.placements.append({**answers[0]["plan"], "step": self.steps - 1})
            return
        if placement == "plan":
            self._state = "moving"
        moving = [a["moving"] for a in answers]
        if self._state == "moving" and True not in moving:
            # None means that no better placement was found. It is None on all ranks or on none.
            self._state, self._last = ("rest" if None in moving else "use"), time.monotonic()

    def summary(self):
        """Statistics in types that JSON supports."""
        rows = np.array(self.rows, dtype=float).reshape(len(self.rows), len(self.totals or []))
        busy = rows[rows.sum(1) > 0]
        return {
            "steps": self.steps,
            "step_seconds": {kind: percentiles(s) for kind, s in self.seconds.items() if s},
            "batch": float(np.mean(self.sizes)) if self.sizes else 0.0,
            "rows_per_rank": self.totals or [],
            "recent_rows_per_rank": rows[-20:].mean(0).tolist() if len(rows) else [],
            "busiest_over_mean": float((busy.max(1) / busy.mean(1)).mean()) if len(busy) else 1.0,
            "placements": list(self.placements),
            "kv_bytes": dict(self.kv_bytes),
            "acceptance": self.accepted / self.drafted if self.drafted else None,
        }
