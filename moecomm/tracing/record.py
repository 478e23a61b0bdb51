"""Recording: what a Buffer was asked to do, compactly, so that it can be done again elsewhere.

Buffer(..., record=PATH) writes into the folder PATH, for every rank, files rank-RRRRR.SSS.npz (segments S of one
sequence), each a NumPy archive of

    header   text: JSON of the format's version, the geometry and the buffer's arguments
    calls    one record per call, see CALL in record_format; a decode call is two, its send and its receive phase
    phases   one record per role of a dispatch or combine, see PHASE there, call after call
    ids      int16 or int32 [sum of tokens, top_k]: the picks of every dispatch that made a plan and of every
             decode_dispatch, in order
    weights  float32 [sum of tokens, top_k]: of those that had some and of every decode_combine that had some, in order

Payload is not recorded: what a call costs depends on the routing alone. moecomm.replay runs a recording again.
"""

from __future__ import annotations

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
    """One rank's part: header dict, calls (array of CALL), phases (array of PHASE), ids [tokens, top_k] and weights by plan number (None: none)."""

    header: dict
    calls: np.ndarray
    phases: np.ndarray
    ids: list
    weights: list


def load(path):
    """A recording, by rank: the calls that all ranks have written. Nothing in its files is believed: what load returns can be run.

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
        There is no recording, a rank's part is missing, the format is another one, or a file is damaged; names the file and the field.
    """
    path = Path(checked_path(OP, "path", path))
    segments = {}
    for file in _files(path):
        if match := SEGMENT.fullmatch(file):
            segments.setdefault(int(match[1]), {})[int(match[2])] = path / file
    if not segments:
        raise InvalidArgument(
            f"recording: {str(path)!r} holds no rank-*.npz; expected a folder that Buffer(..., record=PATH) wrote",
            op=OP,
        )
    size = header_of(min(segments[min(segments)].items())[1])["size"]
    if len(segments) != size or max(segments) != size - 1:
        raise InvalidArgument(
            f"recording: {str(path)!r} holds {len(segments)} ranks; expected ranks 0..{size - 1}", op=OP
        )
    ranks = [_load_rank(rank, segments[rank]) for rank in range(size)]
    together([file for files in segments.values() for _, file in sorted(files.items())[:1]], ranks)
    for r in ranks:
        r.phases = r.phases[: r.calls["phases"].sum(dtype=np.int64)]
        _deal_out(r)
    return ranks


def _files(path):
    try:
        return os.listdir(path)
    except OSError as error:
        raise InvalidArgument(
            f"recording: {str(path)!r} cannot be read ({error}); expected a folder that Buffer(..., record=PATH) wrote",
            op=OP,
        ) from None


def _load_rank(rank, files):
    """The RankRecording of one rank's segments, each checked by itself and all of them together; ids and weights still in one piece."""
    if sorted(files) != list(range(len(files))):
        missing = min(set(range(len(files))) - set(files))
        raise InvalidArgument(
            f"recording: segment {missing:03d} of rank {rank} is missing beside {files[max(files)].name!r}; expected all from 000 on",
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
                f"rank {rank}, and what {files[0].name} says",
            )
    whole = RankRecording(
        first, *(np.concatenate([p[name] for p in parts]) for name in ("calls", "phases", "ids", "weights"))
    )
    sequence(files[0], whole)
    return whole


def _deal_out(rank):
    """Cut ids and weights into those of each plan."""
    of_plan_ids, of_plan_weights, at, weights_at = [], [], 0, 0
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
