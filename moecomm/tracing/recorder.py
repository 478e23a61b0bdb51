"""Recorder: writes the calls of a Buffer to a folder while the Buffer is in use. moecomm.record describes the files.

If a recording cannot be written, for example because the disk is full, it ends, and a RecordingIncomplete warning is
given once. The Buffer keeps working, and close() still releases everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


def check_folder(path: Any, rank: Any, size: int) -> None:
    """Check that this rank can record to the folder. Removes nothing of an earlier recording.

    Raises
    ------
    InvalidArgument
        As open_folder.
    """
    open_folder(path, rank, size).close()


class Recorder:
    """The recording of one rank. Made by Buffer after check_folder.

    Native calls store their records in memory. A separate thread writes them when a segment is full, and at least
    every FLUSH_SECONDS. close(), or the end of the process, writes the rest. A killed process loses its unwritten
    records.
    """

    def __init__(self, path: Any, memory: Any) -> None:
        self._source = NativeCalls(memory.native, memory.top_k, memory.num_experts)
        self.record(True)
        self.segments = Segments(path, memory, self._source)
        self._finalizer = weakref.finalize(self, self.segments.close)

    def record(self, on: bool) -> None:
        """Continue recording dispatch and combine, or pause."""
        self._source.record(on)

    def record_decode(self, native: Any) -> None:
        """Record the calls of the decode path as well, from its creation on."""
        native.record(self._source.recording)

    def close(self) -> None:
        """Write the rest and end the recording."""
        self._finalizer()


class NativeCalls:
    """Records of a native host buffer: a source of segments."""

    def __init__(self, native: Any, top_k: int, num_experts: int) -> None:
        self._native, self._top_k, self._ids = native, top_k, ids_dtype(num_experts)
        self.recording = core.Recording(top_k, num_experts)

    def record(self, on: bool) -> None:
        """Continue recording, or pause."""
        self._native.record(self.recording if on else None)

    @property
    def nbytes(self) -> Any:
        """Bytes that take() would return."""
        return self.recording.nbytes

    def take(self) -> Any:
        """Take the records since the last call: (calls, phases, ids, weights)."""
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
    """Writes the segments of a source in a thread.

    Separate from Recorder, so that the finalizer of Recorder can still write at the end of the process.
    """

    def __init__(self, path: Any, memory: Any, source: Any) -> None:
        comm = memory.comm
        self._path, self._rank, self.source = str(path), comm.rank, source
        self._header = dict(
            format=FORMAT,
            version=__version__,
            rank=comm.rank,
            size=comm.size,
            ranks_per_node=comm.ranks_per_node,
            hidden=memory.hidden,
            num_experts=memory.num_experts,
            top_k=memory.top_k,
            max_tokens=memory.max_tokens,
            dtype=str(memory.dtype).removeprefix("torch."),
            channels=memory.channels,
        )
        self._lock, self._closed, self._number, self._process = (
            threading.Lock(),
            threading.Event(),
            0,
            os.getpid(),
        )
        self._folder: Folder | None = None
        self._failure: BaseException | None = None
        self._reported = False
        with self._fails_once():
            self._folder = Folder(path, comm.rank, comm.size)
            self._folder.remove(self._folder.earlier())
        threading.Thread(target=self._run, name="moecomm recording", daemon=True).start()

    def _run(self) -> None:
        written = time.monotonic()
        while not self._closed.wait(LOOK_SECONDS):
            if self._failure is not None:
                self._discard()  # the recording has failed: keep memory from growing
            elif (
                self.source.nbytes >= SEGMENT_BYTES
                or self.source.nbytes
                and time.monotonic() - written >= FLUSH_SECONDS
            ):
                self.write()
                written = time.monotonic()
                self._report(raising=False)

    def close(self) -> None:
        """Write the rest and release everything. Warns once if the recording is incomplete."""
        if os.getpid() != self._process:  # the end of a forked child: the recording belongs to its parent
            return
        self._closed.set()
        self.write()
        with self._lock:
            if self._folder is not None:
                self._folder.close()
        self._report()

    def write(self) -> None:
        """Write the present records, if there are any; the first segment is written in any case. Never raises."""
        with self._lock, self._fails_once():  # the lock keeps the segments in order
            if self._failure is not None or not self.source.nbytes and self._number:
                return
            calls, phases, ids, weights = self.source.take()
            header = np.array(json.dumps(self._header))
            folder: Any = self._folder  # it is open: a recorder that could not open it has failed
            self._number = 1 + folder.write(
                self._number,
                lambda file: np.savez(
                    file, header=header, calls=calls, phases=phases, ids=ids, weights=weights
                ),
            )

    def fail(self, error: BaseException) -> None:
        """End the recording because of this error."""
        if self._failure is None:
            self._failure = error

    @contextlib.contextmanager
    def _fails_once(self) -> Iterator[Any]:
        try:
            yield
        except Exception as error:  # in any case, the Buffer must keep working and be released
            self.fail(error)

    def _discard(self) -> None:
        with self._lock, self._fails_once():
            self.source.take()

    def _report(self, raising: bool = True) -> None:
        if self._failure is None or self._reported:
            return
        text = (
            f"Buffer: the recording in {self._path!r} ends early on rank {self._rank}, after {self._number} segments "
            f"({type(self._failure).__name__}: {self._failure}); the written segments can be replayed, and the Buffer "
            "keeps working"
        )
        try:
            warnings.warn(RecordingIncomplete(text), stacklevel=2)
            self._reported = True
        except RecordingIncomplete:  # the warnings filter turns warnings into errors
            if raising:
                self._reported = True
                raise
