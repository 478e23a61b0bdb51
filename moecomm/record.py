"""Recording: what a Buffer was asked to do, compactly, so that it can be done again elsewhere.

Buffer(..., record=PATH) writes into the folder PATH, for every rank, files rank-RRRRR.SSS.npz (segments S of one
sequence), each a NumPy archive of

    header   text: JSON of the format's version, the geometry and the buffer's arguments
    calls    one record per call, see CALL
    phases   one record per role that ran, see PHASE, call after call
    ids      int16 or int32 [sum of tokens, top_k]: the picks of every dispatch that made a plan, in order
    weights  float32 [sum of tokens, top_k]: of those dispatches that had some, in order

Payload is not recorded: what a call costs depends on the routing alone. moecomm.replay runs a recording again.
"""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ._version import __version__
from .errors import InvalidArgument

FORMAT = 1
SEGMENT_BYTES = 64 << 20
HOPS = ("rail_logical_rows", "rail_physical_rows", "rail_logical_bytes", "rail_physical_bytes",
        "node_logical_rows", "node_physical_rows", "node_logical_bytes", "node_physical_bytes", "replicated_rows")
CALL = np.dtype([
    ("op", "U8"),            # dispatch | combine
    ("plan", "i8"),          # number of the dispatch whose plan it uses, counted over the plans made
    ("cached", "?"),         # a dispatch that reuses its plan
    ("tokens", "i4"),
    ("weighted", "?"),       # weights travel (dispatch), are applied (combine)
    ("layout", "U6"),
    ("alignment", "i4"),
    ("capacity", "i8"),      # -1: none
    ("coding", "U9"),        # of a dispatch's rows (quant=), of a combine's between nodes (wire=); "": none
    ("begin_ns", "i8"),      # time.perf_counter_ns of this process
    ("end_ns", "i8"),
    ("phases", "i4"),        # how many records of `phases` are this call's
    *((name, "u8") for name in HOPS),
])
PHASE = np.dtype([("role", "U8"), ("begin", "f8"), ("end", "f8")])   # seconds of time.perf_counter


class Recorder:
    """One rank's recording. Made by Buffer; a full segment is written at once, the rest by close() or when the process ends."""

    def __init__(self, path, buffer):
        comm = buffer.comm
        self._state = state = _Segments(Path(path), comm.rank, dict(
            format=FORMAT, version=__version__, rank=comm.rank, size=comm.size, ranks_per_node=comm.ranks_per_node, hidden=buffer.hidden,
            num_experts=buffer.num_experts, top_k=buffer.top_k, max_tokens=buffer.max_tokens, dtype=str(buffer.dtype).removeprefix("torch."),
            channels=buffer.channels))
        self._native, self._ids_dtype = buffer._native, torch.int16 if buffer.num_experts <= 32768 else torch.int32
        self._plans, self._next_plan = {}, 0
        self._counted = (0,) * len(HOPS)
        self._native.trace(True)
        self._finalizer = weakref.finalize(self, state.write)

    def start(self):
        """The time at which a call begins."""
        return time.perf_counter_ns()

    def forget_counts(self):
        """The buffer's counters were reset."""
        self._counted = (0,) * len(HOPS)

    def dispatch(self, began, plan, ids, weights, tokens, layout, alignment, capacity, coding):
        """A dispatch has ended; ids None: it reused the plan."""
        ended = time.perf_counter_ns()
        if ids is not None:
            self._plans[id(plan)] = self._next_plan
            self._next_plan += 1
            self._state.add_picks(ids.to(self._ids_dtype, copy=True).numpy(), None if weights is None else weights.numpy().copy())
        self._add("dispatch", plan, ids is None, tokens, weights is not None, layout, alignment, capacity, coding, began, ended)

    def combine(self, began, plan, tokens, weighted, layout, coding):
        """A combine has ended."""
        self._add("combine", plan, True, tokens, weighted, layout, 1, None, coding, began, time.perf_counter_ns())

    def _add(self, op, plan, cached, tokens, weighted, layout, alignment, capacity, coding, began, ended):
        counted = self._native.counters()
        moved = tuple(now - before for now, before in zip(counted, self._counted))
        self._counted = counted
        phases = self._native.take_timeline()
        self._state.add_call(phases, (op, self._plans[id(plan)], cached, tokens, weighted, layout, alignment, -1 if capacity is None else capacity,
                              coding or "", began, ended, len(phases), *moved))

    def close(self):
        """Write what is left."""
        self._finalizer()


class _Segments:
    """Accumulates one segment and writes it; apart from Recorder so that the end of the process can still write it."""

    def __init__(self, folder, rank, header):
        self._folder, self._rank, self._header = folder, rank, header
        self._lock = threading.Lock()
        self._number = 0
        self._clear()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(f"rank-{rank:05d}.*.npz"):   # of an earlier recording
                old.unlink()
        except OSError as error:
            raise InvalidArgument(f"Buffer: record is {str(folder)!r}; expected a folder that can be written ({error})", op="Buffer", rank=rank) from None

    def _clear(self):
        self._calls, self._phases, self._ids, self._weights, self._bytes = [], [], [], [], 0

    def add_picks(self, ids, weights):
        with self._lock:
            self._ids.append(ids)
            if weights is not None:
                self._weights.append(weights)
            self._bytes += 3 * ids.nbytes

    def add_call(self, phases, call):
        with self._lock:
            self._calls.append(call)
            self._phases += phases
            self._bytes += CALL.itemsize + len(phases) * PHASE.itemsize
        if self._bytes >= SEGMENT_BYTES:
            self.write()

    def write(self):
        with self._lock:
            if not self._calls and self._number:
                return
            top_k = self._header["top_k"]
            path = self._folder / f"rank-{self._rank:05d}.{self._number:03d}.npz"
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                np.savez(file, header=np.array(json.dumps(self._header)), calls=np.array(self._calls, dtype=CALL),
                         phases=np.array(self._phases, dtype=PHASE),
                         ids=np.concatenate(self._ids) if self._ids else np.zeros((0, top_k), np.int16),
                         weights=np.concatenate(self._weights) if self._weights else np.zeros((0, top_k), np.float32))
            os.replace(partial, path)   # a reader sees whole segments only
            self._number += 1
            self._clear()


@dataclass
class RankRecording:
    """One rank's part: header dict, calls (array of CALL), phases (array of PHASE), ids [tokens, top_k] and weights by plan number (None: none)."""

    header: dict
    calls: np.ndarray
    phases: np.ndarray
    ids: list
    weights: list


def load(path):
    """A recording, by rank.

    Parameters
    ----------
    path : path-like
        The folder that was given to Buffer.

    Returns
    -------
    list of RankRecording

    Raises
    ------
    InvalidArgument
        There is no recording, a rank's part is missing, or the format is another one.
    """
    path = Path(path)
    segments = {}
    for file in sorted(path.glob("rank-*.npz")):
        segments.setdefault(int(file.name.split(".")[0].removeprefix("rank-")), []).append(file)
    if not segments:
        raise InvalidArgument(f"recording: {str(path)!r} holds no rank-*.npz; expected a folder that Buffer(..., record=PATH) wrote", op="replay")
    ranks = [_load_rank(files) for _, files in sorted(segments.items())]
    size = ranks[0].header["size"]
    if len(ranks) != size or len({len(r.calls) for r in ranks}) > 1:
        raise InvalidArgument(f"recording: {str(path)!r} holds {len(ranks)} ranks with {sorted({len(r.calls) for r in ranks})} calls; "
                              f"expected {size} ranks with equally many", op="replay")
    return ranks


def _load_rank(files):
    parts = []
    for file in files:
        with np.load(file) as archive:
            parts.append({name: archive[name] for name in archive.files})
    header = json.loads(str(parts[0]["header"]))
    if header.get("format") != FORMAT:
        raise InvalidArgument(f"recording: {files[0].name} has format {header.get('format')!r}; expected {FORMAT}", op="replay")
    calls, phases, ids, weights = (np.concatenate([p[name] for p in parts]) for name in ("calls", "phases", "ids", "weights"))
    of_plan_ids, of_plan_weights, at, weights_at = [], [], 0, 0
    for call in calls[(calls["op"] == "dispatch") & ~calls["cached"]]:
        n = int(call["tokens"])
        of_plan_ids.append(ids[at:at + n])
        of_plan_weights.append(weights[weights_at:weights_at + n] if call["weighted"] else None)
        at += n
        weights_at += n if call["weighted"] else 0
    return RankRecording(header, calls, phases, of_plan_ids, of_plan_weights)
