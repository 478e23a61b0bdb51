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
from pathlib import Path

import numpy as np

from ._native import core
from ._version import __version__
from .errors import InvalidArgument
from .shapes import QUANTS, WIRES

FORMAT = 2
SEGMENT_BYTES = 64 << 20
LOOK_SECONDS, FLUSH_SECONDS = 0.5, 60.0
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
OPS = ("dispatch", "combine", *DECODE_OPS)   # by the numbers of the C++ RecordedOp
# C++ RecordedCall and RoleSpan.
NATIVE_CALL = np.dtype([*((name, "i8") for name in ("plan", "capacity", "begin", "end", "spans")), *((name, "u8") for name in HOPS),
                        *((name, "i4") for name in ("op", "tokens", "alignment", "coding", "cached", "weighted", "by_rank", "unused"))])
NATIVE_SPAN = np.dtype([("role", "i4"), ("unused", "i4"), ("begin", "i8"), ("end", "i8")])
PHASE = np.dtype([("role", "U8"), ("begin", "f8"), ("end", "f8")])   # seconds of time.perf_counter


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
    """One rank's recording. Made by Buffer after make_folder.

    The native calls note what they do; a thread of its own writes it when there is a full segment, at least every FLUSH_SECONDS, and
    close() or the end of the process what is left. A process that is killed loses what was not written yet.
    """

    def __init__(self, path, buffer):
        self._source = NativeCalls(buffer._native, buffer.top_k, buffer.num_experts)
        self.record(True)
        self.segments = Segments(path, buffer, self._source)
        self._finalizer = weakref.finalize(self, self.segments.close)

    def record(self, on):
        """Go on recording dispatch and combine, or pause."""
        self._source.record(on)

    def record_decode(self, native):
        """The decode path is there: its calls are recorded too."""
        native.record(self._source.recording)

    def close(self):
        """Write what is left."""
        self._finalizer()


class NativeCalls:
    """What a native buffer of the host notes: a source of segments."""

    def __init__(self, native, top_k, num_experts):
        self._native, self._top_k, self._ids = native, top_k, ids_dtype(num_experts)
        self.recording = core.Recording(top_k, num_experts)

    def record(self, on):
        """Go on, or pause."""
        self._native.record(self.recording if on else None)

    @property
    def nbytes(self):
        """Of what take() would give."""
        return self.recording.nbytes

    def take(self):
        """(calls, phases, ids, weights) since the last time."""
        calls, ids, weights, spans = self._native.take(self.recording)
        native, timeline = np.frombuffer(calls, NATIVE_CALL), np.frombuffer(spans, NATIVE_SPAN)
        rows, phases = np.zeros(len(native), CALL), np.zeros(len(timeline), PHASE)
        for name in ("plan", "tokens", "alignment", "capacity", *HOPS):
            rows[name] = native[name]
        for name in ("cached", "weighted"):
            rows[name] = native[name] != 0
        rows["begin_ns"], rows["end_ns"] = native["begin"], native["end"]
        rows["op"] = np.array(OPS)[native["op"]]
        rows["layout"] = np.array(("expert", "rank"))[native["by_rank"]]
        wired = np.isin(rows["op"], ("combine", "decode_combine"))
        rows["coding"] = np.where(wired, np.array([w or "" for w in WIRES])[native["coding"]], np.array([q or "" for q in QUANTS])[native["coding"]])
        rows["phases"] = np.diff(native["spans"].astype(np.int64), prepend=0)
        phases["role"] = np.array(core.ROLES)[timeline["role"]]
        phases["begin"], phases["end"] = timeline["begin"] * 1e-9, timeline["end"] * 1e-9
        return rows, phases, np.frombuffer(ids, self._ids).reshape(-1, self._top_k), np.frombuffer(weights, np.float32).reshape(-1, self._top_k)


def ids_dtype(num_experts):
    """Of recorded picks."""
    return np.int16 if num_experts <= 32768 else np.int32


class Segments:
    """Takes segments from a source and writes them, in a thread; apart from Recorder so that the end of the process can still write."""

    def __init__(self, path, buffer, source):
        comm = buffer.comm
        self._folder, self._rank, self.source = Path(path), comm.rank, source
        self._header = dict(
            format=FORMAT, version=__version__, rank=comm.rank, size=comm.size, ranks_per_node=comm.ranks_per_node, hidden=buffer.hidden,
            num_experts=buffer.num_experts, top_k=buffer.top_k, max_tokens=buffer.max_tokens, dtype=str(buffer.dtype).removeprefix("torch."),
            channels=buffer.channels)
        self._lock, self._closed, self._number = threading.Lock(), threading.Event(), 0
        for old in self._folder.glob(f"rank-{comm.rank:05d}.*"):   # of an earlier recording, or of make_folder
            old.unlink()
        threading.Thread(target=self._run, name="moecomm recording", daemon=True).start()

    def _run(self):
        written = time.monotonic()
        while not self._closed.wait(LOOK_SECONDS):
            if self.source.nbytes >= SEGMENT_BYTES or self.source.nbytes and time.monotonic() - written >= FLUSH_SECONDS:
                self.write()
                written = time.monotonic()

    def close(self):
        """Write what is left."""
        self._closed.set()
        self.write()

    def write(self):
        """Take what there is and write it; the first segment also where there is nothing."""
        with self._lock:   # one segment after the other
            if not self.source.nbytes and self._number:
                return
            calls, phases, ids, weights = self.source.take()
            path = self._folder / f"rank-{self._rank:05d}.{self._number:03d}.npz"
            partial_path = path.with_suffix(".partial")
            with open(partial_path, "wb") as file:
                np.savez(file, header=np.array(json.dumps(self._header)), calls=calls, phases=phases, ids=ids, weights=weights)
            os.replace(partial_path, path)   # a reader sees whole segments only
            self._number += 1


@dataclass
class RankRecording:
    """One rank's part: header dict, calls (array of CALL), phases (array of PHASE), ids [tokens, top_k] and weights by plan number (None: none)."""

    header: dict
    calls: np.ndarray
    phases: np.ndarray
    ids: list
    weights: list


def load(path):
    """A recording, by rank: the calls that all ranks have written.

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
    if len(ranks) != size:
        raise InvalidArgument(f"recording: {str(path)!r} holds {len(ranks)} ranks; expected {size}", op="replay")
    count = min(len(r.calls) for r in ranks)   # calls are collective: where a process was killed, what all ranks have written
    weighted = np.any([r.calls["weighted"][:count] for r in ranks], axis=0)
    for r in ranks:
        r.calls = r.calls[:count]
        r.calls["weighted"] |= weighted & (r.calls["tokens"] == 0)   # a rank without tokens had no weights to note
        r.phases = r.phases[:r.calls["phases"].sum()]
        _deal_out(r)
    return ranks


def _load_rank(files):
    parts = []
    for file in files:
        with np.load(file) as archive:
            parts.append({name: archive[name] for name in archive.files})
    header = json.loads(str(parts[0]["header"]))
    if header.get("format") != FORMAT:
        raise InvalidArgument(f"recording: {files[0].name} has format {header.get('format')!r}; expected {FORMAT}", op="replay")
    return RankRecording(header, *(np.concatenate([p[name] for p in parts]) for name in ("calls", "phases", "ids", "weights")))


def _deal_out(rank):
    """Cut ids and weights into those of each plan."""
    of_plan_ids, of_plan_weights, at, weights_at = [], [], 0, 0
    for call in rank.calls[np.isin(rank.calls["op"], ("dispatch", "decode_dispatch", "decode_combine")) & ~rank.calls["cached"]]:
        n, own = int(call["tokens"]), None
        if call["weighted"]:
            own = rank.weights[weights_at:weights_at + n]
            weights_at += n
        if call["op"] == "decode_combine":
            if own is not None:
                of_plan_weights[call["plan"]] = own
            continue
        of_plan_ids.append(rank.ids[at:at + n])
        of_plan_weights.append(own)
        at += n
    rank.ids, rank.weights = of_plan_ids, of_plan_weights
