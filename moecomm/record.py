"""Recording: what a Buffer was asked to do, compactly, so that it can be done again elsewhere.

Buffer(..., record=PATH) writes into the folder PATH, for every rank, files rank-RRRRR.SSS.npz (segments S of one
sequence), each a NumPy archive of

    header   text: JSON of the format's version, the geometry and the buffer's arguments
    calls    one record per call, see CALL; a decode call is two, its send and its receive phase
    phases   one record per role of a dispatch or combine, see PHASE, call after call
    ids      int16 or int32 [sum of tokens, top_k]: the picks of every dispatch that made a plan and of every
             decode_dispatch, in order
    weights  float32 [sum of tokens, top_k]: of those that had some and of every decode_combine that had some, in order

Payload is not recorded: what a call costs depends on the routing alone. moecomm.replay runs a recording again.
"""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ._version import __version__
from .errors import InvalidArgument
from .shapes import QUANTS, SCALE_DTYPES

FORMAT = 2
SEGMENT_BYTES = 64 << 20
HOPS = ("rail_logical_rows", "rail_physical_rows", "rail_logical_bytes", "rail_physical_bytes",
        "node_logical_rows", "node_physical_rows", "node_logical_bytes", "node_physical_bytes", "replicated_rows")
DECODE_OPS = ("decode_dispatch", "decode_receive", "decode_combine", "decode_sum")
CALL = np.dtype([
    ("op", "U15"),           # dispatch | combine | one of DECODE_OPS
    ("plan", "i8"),          # number of the dispatch that it belongs to, counted over those whose picks are recorded
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
NOTHING = (0,) * len(HOPS)
QUANT_OF = dict(zip(SCALE_DTYPES, QUANTS))   # what rows with such scales are


def make_folder(path, rank):
    """Make sure that rank can write there.

    Raises
    ------
    InvalidArgument
    """
    try:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank-{rank:05d}.partial", "wb"):
            pass
    except (OSError, TypeError) as error:
        raise InvalidArgument(f"Buffer: record is {str(path)!r}; expected a folder that can be written ({error})", op="Buffer", rank=rank) from None


class Recorder:
    """One rank's recording. Made by Buffer after make_folder; full segments are written in the background, the rest by close() or when the process ends."""

    def __init__(self, path, buffer):
        comm = buffer.comm
        self._native = buffer._native
        self._state = state = _Segments(Path(path), comm.rank, self._native, dict(
            format=FORMAT, version=__version__, rank=comm.rank, size=comm.size, ranks_per_node=comm.ranks_per_node, hidden=buffer.hidden,
            num_experts=buffer.num_experts, top_k=buffer.top_k, max_tokens=buffer.max_tokens, dtype=str(buffer.dtype).removeprefix("torch."),
            channels=buffer.channels))
        self._plans, self._decoding, self._next_plan = {}, [0, 0], 0
        self.forget_counts()
        self._native.trace(True)
        self._finalizer = weakref.finalize(self, self._end_with(state))

    def _end_with(self, state):
        return state.close   # must not keep this object

    def start(self):
        """The time, at a call's begin or end."""
        return time.perf_counter_ns()

    def forget_counts(self):
        """The buffer's counters were reset."""
        self._counted, self._decode_counted = NOTHING, NOTHING

    def dispatch(self, began, plan, ids, weights, tokens, layout, alignment, capacity, coding):
        """A dispatch has ended; ids None: it reused the plan."""
        ended = self.start()
        if ids is not None:
            self._plans[id(plan)] = self._add_picks(ids, weights)
        self._add("dispatch", plan, ids is None, tokens, weights is not None, layout, alignment, capacity, coding, began, ended)

    def combine(self, began, plan, tokens, weighted, layout, coding):
        """A combine has ended."""
        self._add("combine", plan, True, tokens, weighted, layout, 1, None, coding, began, self.start())

    def decode_dispatch(self, decode, x, ids, weights, quant, scale_layout, return_hook):
        """Decode.dispatch, recorded."""
        began = self.start()
        received, hook = decode.dispatch(x, ids, weights, quant, scale_layout, True)
        ended = self.start()
        handle = received.handle
        plan = self._decoding[handle.epoch & 1] = self._add_picks(ids, weights)
        coding = QUANT_OF[x[1].dtype] if isinstance(x, tuple) else quant
        self._add_decode("decode_dispatch", decode, plan, handle.tokens, weights is not None, coding, began, ended)
        return received, self._second("decode_receive", decode, hook, plan, handle.tokens, return_hook)

    def decode_combine(self, decode, rows, ids, weights, handle, wire, return_hook, out):
        """Decode.combine, recorded."""
        began = self.start()
        y, hook = decode.combine(rows, ids, weights, handle, wire, True, out)
        ended = self.start()
        plan = self._decoding[handle.epoch & 1]
        self._add_rows(None, weights)
        self._add_decode("decode_combine", decode, plan, handle.tokens, weights is not None, wire, began, ended)
        return y, self._second("decode_sum", decode, hook, plan, handle.tokens, return_hook)

    def _second(self, op, decode, hook, plan, tokens, return_hook):
        """A hook that records itself; None where it has run."""
        hook = partial(self._receive, op, decode, hook, plan, tokens)
        return hook if return_hook else hook()

    def _receive(self, op, decode, hook, plan, tokens):
        began = self.start()
        hook()
        self._add_decode(op, decode, plan, tokens, False, None, began, self.start())

    def _add_picks(self, ids, weights):
        self._add_rows(ids, weights)
        self._next_plan += 1
        return self._next_plan - 1

    def _add_rows(self, ids, weights):
        if ids is not None:
            self._state.add_ids(ids)
        if weights is not None:
            self._state.add_weights(weights)

    def _add_call(self, call, began, ended, before, after):
        self._state.add_call((*call, began, ended), self._native.timeline_size(), before, after)

    def _add(self, op, plan, cached, tokens, weighted, layout, alignment, capacity, coding, began, ended):
        before, self._counted = self._counted, self._counts(self._native)
        self._add_call((op, self._plans[id(plan)], cached, tokens, weighted, layout, alignment, -1 if capacity is None else capacity, coding or ""),
                       began, ended, before, self._counted)

    def _add_decode(self, op, decode, plan, tokens, weighted, coding, began, ended):
        before, self._decode_counted = self._decode_counted, self._counts(decode.native)
        self._add_call((op, plan, False, tokens, weighted, "expert", 1, -1, coding or ""), began, ended, before, self._decode_counted)

    @staticmethod
    def _counts(native):
        return native.counters()

    def close(self):
        """Write what is left."""
        self._finalizer()


class _Rows:
    """Rows that are appended, in memory that is there already."""

    def __init__(self, columns, dtype):
        self._rows, self._end = np.full((4096, columns), 0, dtype), 0   # written once: pages are there before a call needs them

    def add(self, tensor):
        end = self._end + len(tensor)
        if end > len(self._rows):
            self._rows = np.concatenate([self._rows, np.full((max(len(self._rows), len(tensor)), self._rows.shape[1]), 0, self._rows.dtype)])
        np.copyto(self._rows[self._end:end], tensor.numpy(), casting="same_kind")   # experts were checked: they fit
        self._end = end

    @property
    def nbytes(self):
        return self._end * self._rows.strides[0]

    def array(self):
        return self._rows[:self._end]


class _Segments:
    """Accumulates one segment while another is written; apart from Recorder so that the end of the process can still write."""

    def __init__(self, folder, rank, native, header):
        self._folder, self._rank, self._native, self._header = folder, rank, native, header
        self._lock, self._writer = threading.Lock(), None
        self._number = 0
        self._clear()
        for old in folder.glob(f"rank-{rank:05d}.*"):   # of an earlier recording, or of make_folder
            old.unlink()

    def _clear(self):
        top_k = self._header["top_k"]
        self._calls, self._bytes = [], 0
        self._ids = _Rows(top_k, np.int16 if self._header["num_experts"] <= 32768 else np.int32)
        self._weights = _Rows(top_k, np.float32)

    def add_ids(self, ids):
        with self._lock:
            self._ids.add(ids)

    def add_weights(self, weights):
        with self._lock:
            self._weights.add(weights)

    def add_call(self, call, spans, before, after):
        """spans: of roles, since the segment began."""
        with self._lock:
            self._calls.append((call, spans, before, after))
            self._bytes += CALL.itemsize
            full = self._bytes + spans * PHASE.itemsize + self._ids.nbytes + self._weights.nbytes >= SEGMENT_BYTES
        if full:
            self.write()

    def write(self):
        """Hand the segment to a thread that writes it, after the one before."""
        self._wait()
        self._writer = threading.Thread(target=self._save, args=self._take())
        self._writer.start()

    def close(self):
        """Write what is left."""
        self._wait()
        if self._calls or not self._number:
            self._save(*self._take())

    def _wait(self):
        if self._writer is not None:
            self._writer.join()

    def _take(self):
        with self._lock:
            path = self._folder / f"rank-{self._rank:05d}.{self._number:03d}.npz"
            content = path, self._calls, self._native.take_timeline(), self._ids.array(), self._weights.array()
            self._number += 1
            self._clear()
        return content

    def _save(self, path, calls, phases, ids, weights):
        began, rows = 0, []
        for call, spans, before, after in calls:
            rows.append((*call, spans - began, *(b - a for a, b in zip(before, after))))
            began = spans
        partial_path = path.with_suffix(".partial")
        with open(partial_path, "wb") as file:
            np.savez(file, header=np.array(json.dumps(self._header)), calls=np.array(rows, dtype=CALL), phases=np.array(phases, dtype=PHASE),
                     ids=ids, weights=weights)
        os.replace(partial_path, path)   # a reader sees whole segments only


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
    for call in calls[np.isin(calls["op"], ("dispatch", "decode_dispatch", "decode_combine")) & ~calls["cached"]]:
        n, own = int(call["tokens"]), None
        if call["weighted"]:
            own = weights[weights_at:weights_at + n]
            weights_at += n
        if call["op"] == "decode_combine":
            if own is not None:
                of_plan_weights[call["plan"]] = own
            continue
        of_plan_ids.append(ids[at:at + n])
        of_plan_weights.append(own)
        at += n
    return RankRecording(header, calls, phases, of_plan_ids, of_plan_weights)
