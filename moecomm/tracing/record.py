"""Recording: stores the calls of a Buffer in compact files, so that they can be replayed elsewhere.

With Buffer(..., record=PATH) every rank writes files rank-RRRRR.SSS.npz (rank R, segment S) to the folder PATH. Each
file is a NumPy archive of

    header   text: JSON with the version of the format, the geometry and the arguments of the Buffer
    calls    one record per call, see CALL in format.py; a decode call has two, for its send and its receive phase
    phases   one record per role of a dispatch or combine, see PHASE in format.py, in the order of the calls
    ids      int16 or int32 [sum of tokens, top_k]: picks of every dispatch that made a plan and of every
             decode_dispatch, in order
    weights  float32 [sum of tokens, top_k]: weights of these calls and of every decode_combine, in order, for the
    calls
             that had weights

Payload is not recorded, because the cost of a call depends on the routing alone. moecomm.replay replays a recording.
"""

from __future__ import annotations

from typing import Any

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .archives import refuse
from ..checks import path as checked_path
from ..errors import InvalidArgument
from .check import header_of, segment_of, sequence, together
from .files import SEGMENT
from .format import CALL, DECODE_OPS, FORMAT, HOPS, OPS, PHASE, ids_dtype
from .recorder import NativeCalls, Recorder, Segments

__all__ = [
    "CALL",
    "DECODE_OPS",
    "FORMAT",
    "HOPS",
    "NativeCalls",
    "OPS",
    "PHASE",
    "RankRecording",
    "Recorder",
    "Segments",
    "ids_dtype",
    "load",
]

OP = "replay"


@dataclass
class RankRecording:
    """One rank of a recording.

    Attributes
    ----------
    header : dict
    calls, phases : array of CALL, of PHASE
    ids : list of array [tokens, top_k]
        Picks, by plan.
    weights : list of array float32 [tokens, top_k] or None
        Weights, by plan.
    """

    header: dict[str, Any]
    calls: np.ndarray
    phases: np.ndarray
    ids: list[Any]
    weights: list[Any]


def load(path: Any) -> Any:
    """Load a recording: the calls that all ranks have written. The files may be untrusted; everything is checked.

    Parameters
    ----------
    path : path-like
        The folder of the recording: record= of Buffer.

    Returns
    -------
    list of RankRecording, by rank

    Raises
    ------
    InvalidArgument
        The folder has no recording, a rank or a segment is missing, the format has another version, or a file is
        damaged. The text names the file and the field.
    """
    path = Path(checked_path(OP, "path", path))
    segments: dict[Any, Any] = {}
    for file in _files(path):
        if match := SEGMENT.fullmatch(file):
            segments.setdefault(int(match[1]), {})[int(match[2])] = path / file
    if not segments:
        raise InvalidArgument(
            f"recording: {str(path)!r} contains no rank-*.npz; expected a folder that Buffer(..., record=PATH) wrote",
            op=OP,
        )
    size = header_of(min(segments[min(segments)].items())[1])["size"]
    if len(segments) != size or max(segments) != size - 1:
        raise InvalidArgument(
            f"recording: {str(path)!r} contains {len(segments)} ranks; expected ranks 0..{size - 1}", op=OP
        )
    ranks = [_load_rank(rank, segments[rank]) for rank in range(size)]
    together([file for files in segments.values() for _, file in sorted(files.items())[:1]], ranks)
    for r in ranks:
        r.phases = r.phases[: r.calls["phases"].sum(dtype=np.int64)]
        _split_by_plan(r)
    return ranks


def _files(path: Any) -> Any:
    try:
        return os.listdir(path)
    except OSError as error:
        raise InvalidArgument(
            f"recording: {str(path)!r} cannot be read ({error}); "
            "expected a folder that Buffer(..., record=PATH) wrote",
            op=OP,
        ) from None


def _load_rank(rank: Any, files: Any) -> Any:
    """Load and check all segments of one rank. ids and weights of the result are not yet split by plan."""
    if sorted(files) != list(range(len(files))):
        missing = min(set(range(len(files))) - set(files))
        raise InvalidArgument(
            f"recording: segment {missing:03d} of rank {rank} is missing, though {files[max(files)].name!r} exists; "
            "expected all segments from 000 on",
            op=OP,
        )
    parts = [segment_of(files[n]) for n in range(len(files))]
    first = parts[0]["header"]
    for n, part in enumerate(parts):
        if part["header"] != first or first["rank"] != rank:
            refuse(
                "recording",
                files[n],
                "header",
                f"is {part['header']}",
                f"the header of {files[0].name}, with rank {rank}",
            )
    joined: Any = (np.concatenate([p[name] for p in parts]) for name in ("calls", "phases", "ids", "weights"))
    whole = RankRecording(first, *joined)
    sequence(files[0], whole)
    return whole


def _split_by_plan(rank: Any) -> None:
    """Split ids and weights by plan."""
    of_plan_ids: list[Any] = []
    of_plan_weights: list[Any] = []
    at, weights_at = 0, 0
    for call in rank.calls[
        np.isin(rank.calls["op"], ("dispatch", "decode_dispatch", "decode_combine")) & ~rank.calls["cached"]
    ]:
        n, own = int(call["tokens"]), None
        if call["weighted"]:
            own = rank.weights[weights_at : weights_at + n]
            weights_at += n
        if call["op"] == "decode_combine":
            if own is not None:
                of_plan_weights[call["plan"]] = own
            continue
        of_plan_ids.append(rank.ids[at : at + n])
        of_plan_weights.append(own)
        at += n
    rank.ids, rank.weights = of_plan_ids, of_plan_weights
