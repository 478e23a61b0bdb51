"""Recorder: what a Buffer was asked to do goes into a folder while it goes on; moecomm.record says what the files hold.

A recording that cannot be written, a full disk say, ends there and is reported once, as a RecordingIncomplete warning: the Buffer
works on, and close() releases everything in any case.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import warnings
import weakref

import numpy as np

from .._native import core
from .._version import __version__
from ..errors import RecordingIncomplete
from .files import Folder, open_folder
from .format import CALL, FORMAT, HOPS, NATIVE_CALL, NATIVE_SPAN, OPS, PHASE, ids_dtype
from ..shapes import QUANTS, WIRES

SEGMENT_BYTES = 64 << 20
LOOK_SECONDS, FLUSH_SECONDS = 0.5, 60.0


def check_folder(path, rank, size):
    """Make sure that this rank can record there; nothing of an earlier recording is removed yet.

    Raises
    ------
    InvalidArgument
    """
    open_folder(path, rank, size).close()


class Recorder:
    """One rank's recording. Made by Buffer after check_folder.

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
        rows["coding"] = np.where(
            wired,
            np.array([w or "" for w in WIRES])[native["coding"]],
            np.array([q or "" for q in QUANTS])[native["coding"]],
        )
        rows["phases"] = np.diff(native["spans"].astype(np.int64), prepend=0)
        phases["role"] = np.array(core.ROLES)[timeline["role"]]
        phases["begin"], phases["end"] = timeline["begin"] * 1e-9, timeline["end"] * 1e-9
        return (
            rows,
            phases,
            np.frombuffer(ids, self._ids).reshape(-1, self._top_k),
            np.frombuffer(weights, np.float32).reshape(-1, self._top_k),
        )


class Segments:
    """Takes segments from a source and writes them, in a thread; apart from Recorder so that the end of the process can still write."""

    def __init__(self, path, buffer, source):
        comm = buffer.comm
        self._path, self._rank, self.source = str(path), comm.rank, source
        self._header = dict(
            format=FORMAT,
            version=__version__,
            rank=comm.rank,
            size=comm.size,
            ranks_per_node=comm.ranks_per_node,
            hidden=buffer.hidden,
            num_experts=buffer.num_experts,
            top_k=buffer.top_k,
            max_tokens=buffer.max_tokens,
            dtype=str(buffer.dtype).removeprefix("torch."),
            channels=buffer.channels,
        )
        self._lock, self._closed, self._number, self._process = (
            threading.Lock(),
            threading.Event(),
            0,
            os.getpid(),
        )
        self._folder, self._failure, self._reported = None, None, False
        with self._fails_once():
            self._folder = Folder(path, comm.rank, comm.size)
            self._folder.remove(self._folder.earlier())
        threading.Thread(target=self._run, name="moecomm recording", daemon=True).start()

    def _run(self):
        written = time.monotonic()
        while not self._closed.wait(LOOK_SECONDS):
            if self._failure is not None:
                self._take()  # nobody will want it, and memory must not grow
            elif (
                self.source.nbytes >= SEGMENT_BYTES
                or self.source.nbytes
                and time.monotonic() - written >= FLUSH_SECONDS
            ):
                self.write()
                written = time.monotonic()
                self._report(raising=False)

    def close(self):
        """Write what is left, and release everything. Warns where the recording is incomplete, unless that was said."""
        if os.getpid() != self._process:  # a forked child ends: the recording is its parent's
            return
        self._closed.set()
        self.write()
        with self._lock:
            if self._folder is not None:
                self._folder.close()
        self._report()

    def write(self):
        """Take what there is and write it; the first segment also where there is nothing. Never raises: see close."""
        with self._lock, self._fails_once():  # one segment after the other
            if self._failure is not None or not self.source.nbytes and self._number:
                return
            calls, phases, ids, weights = self.source.take()
            header = np.array(json.dumps(self._header))
            self._number = 1 + self._folder.write(
                self._number,
                lambda file: np.savez(
                    file, header=header, calls=calls, phases=phases, ids=ids, weights=weights
                ),
            )

    def fail(self, error):
        """The recording ends here, and this is why."""
        if self._failure is None:
            self._failure = error

    @contextlib.contextmanager
    def _fails_once(self):
        try:
            yield
        except Exception as error:  # a full disk, a folder that is gone: whatever it is, the Buffer must go on and be released
            self.fail(error)

    def _take(self):
        with self._lock, self._fails_once():
            self.source.take()

    def _report(self, raising=True):
        if self._failure is None or self._reported:
            return
        text = (
            f"Buffer: the recording in {self._path!r} ends early on rank {self._rank}, after {self._number} segments "
            f"({type(self._failure).__name__}: {self._failure}); replay reads what was written, the Buffer itself is not affected"
        )
        try:
            warnings.warn(RecordingIncomplete(text), stacklevel=2)
            self._reported = True
        except RecordingIncomplete:  # warnings are errors here
            if raising:
                self._reported = True
                raise
