"""Checks of the segments of a recording. Later code, such as replay and simulation, relies on them.

A recording may be damaged, or come from an untrusted source. Every refusal names the file and the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import json

import numpy as np

from .._native import core
from .archives import read_archive, refuse
from ..checks import spelled
from ..errors import InvalidArgument
from .format import CALL, DECODE_OPS, FORMAT, HOPS, OPS, PHASE, ids_dtype
from ..shapes import DTYPES, QUANTS, WIRES, arena_size, check_shape

_OP = "recording"
_MOST_TEXT = 65536  # characters of a header
_MOST_HIDDEN = 1 << 20
_MOST_BYTES = 1 << 48  # limit of the bytes that a call claims to have moved, and of a rank's arena
_DTYPES = {str(d).removeprefix("torch."): d for d in DTYPES}
_PARTS = ("header", "calls", "phases", "ids", "weights")
# Decode hooks are local.
COLLECTIVE = ("dispatch", "combine", "decode_dispatch", "decode_combine")


def header_of(file: Any) -> Any:
    """Read the header of a segment as a dict.

    Raises
    ------
    InvalidArgument
        The file or its header is damaged.
    """
    return _header(file, read_archive(_OP, file, _PARTS)["header"])


def segment_of(file: Any) -> Any:
    """Read a segment: {name: array}, each checked separately; "header" is a dict.

    Raises
    ------
    InvalidArgument
        The file or one of its arrays is damaged.
    """
    parts = read_archive(_OP, file, _PARTS)
    parts["header"] = header = _header(file, parts["header"])
    for name, dtype in (
        ("calls", CALL),
        ("phases", PHASE),
        ("ids", np.dtype(ids_dtype(header["num_experts"]))),
        ("weights", np.dtype(np.float32)),
    ):
        shape: tuple[int, ...] = (-1,) if name in ("calls", "phases") else (-1, header["top_k"])
        if parts[name].dtype != dtype or parts[name].shape[1:] != shape[1:] or parts[name].ndim != len(shape):
            refuse(
                _OP,
                file,
                name,
                f"is {spelled(parts[name])}",
                f"{len(shape)} dimensions of {spelled(dtype)}{f', {shape[1]} wide' if shape[1:] else ''}",
            )
    _check_calls(file, parts["calls"], header)
    _check_phases(file, parts["phases"])
    _check_ids(file, parts["ids"], header["num_experts"])
    if parts["calls"]["phases"].sum(dtype=np.int64) != len(parts["phases"]):
        refuse(
            _OP,
            file,
            "calls.phases",
            f"sum to {parts['calls']['phases'].sum(dtype=np.int64)}",
            f"the {len(parts['phases'])} phases of the segment",
        )
    return parts


def sequence(file: Any, rank: Any) -> None:
    """Check the sequence of one rank's calls.

    Every plan must be made before it is used, and every token must have picks and, where recorded, weights.

    Raises
    ------
    InvalidArgument
        The sequence is impossible.
    """
    calls = rank.calls
    made: list[Any] = []
    next_ids, next_weights = 0, 0
    live: dict[Any, Any] = {}  # {plan: state} of the two decode steps whose memory is in use
    columns = [calls[name].tolist() for name in ("op", "plan", "tokens", "cached", "weighted", "layout")]
    for i, (op, plan, tokens, cached, weighted, layout) in enumerate(zip(*columns)):
        if cached != (op == "combine") and op != "dispatch":
            refuse(
                _OP,
                file,
                f"calls[{i}].cached",
                f"is {cached} for {op}",
                "True for combine, False for the decode path",
            )
        if op == "decode_dispatch" or (op == "dispatch" and not cached):
            if plan != len(made):
                refuse(_OP, file, f"calls[{i}].plan", f"is {plan}", f"{len(made)}, the next plan")
            made.append((op == "dispatch", tokens, layout, weighted))
            next_ids += tokens
            if op == "decode_dispatch":
                live = {
                    p: "received" if stage == "sent" else stage for p, stage in list(live.items())[-1:]
                } | {plan: "sent"}
        elif (
            not 0 <= plan < len(made)
            or made[plan][0] != (op in ("dispatch", "combine"))
            or (op in DECODE_OPS and plan not in live)
        ):
            refuse(
                _OP,
                file,
                f"calls[{i}].plan",
                f"is {plan} for {op}",
                "the plan of an earlier dispatch of the same path, one of the last two in decode",
            )
        elif made[plan][1] != tokens or made[plan][2] != layout:
            refuse(
                _OP,
                file,
                f"calls[{i}]",
                f"has {tokens} tokens in layout {layout}",
                f"those of its plan, {made[plan][1]} in layout {made[plan][2]}",
            )
        elif op == "decode_receive":
            live[plan] = "received" if live[plan] == "sent" else live[plan]
        elif op == "decode_combine":
            if live[plan] not in ("received", "summed") or (weighted and made[plan][3]):
                refuse(
                    _OP,
                    file,
                    f"calls[{i}]",
                    f"combines a step that is {live[plan]}{' and has sent its weights already' * weighted}",
                    "a step that has been received, and summed if it was combined before, with weights in one call "
                    "only",
                )
            live[plan] = "combined"
        elif op == "decode_sum":
            if live[plan] not in ("combined", "summed"):
                refuse(
                    _OP,
                    file,
                    f"calls[{i}]",
                    f"sums a step that is {live[plan]}",
                    "a step that has been combined",
                )
            live[plan] = "summed"
        if weighted and not cached and op in ("dispatch", "decode_dispatch", "decode_combine"):
            next_weights += tokens
    for name, needed in (("ids", next_ids), ("weights", next_weights)):
        if len(getattr(rank, name)) < needed:
            refuse(
                _OP,
                file,
                name,
                f"has {len(getattr(rank, name))} rows in all segments",
                f"{needed}, one for each token of the calls",
            )


def together(files: Any, ranks: Sequence[Any]) -> None:
    """Truncate all ranks to the calls that every rank has written, and check that the calls agree.

    files : one file of each rank, for error texts.

    Raises
    ------
    InvalidArgument
        Ranks have different headers or made different calls.
    """
    for file, r in zip(files, ranks):
        if {**r.header, "rank": 0, "version": ""} != {**ranks[0].header, "rank": 0, "version": ""}:
            refuse(
                _OP,
                file,
                "header",
                f"is {spelled(r.header)}",
                f"the header of rank 0, {spelled(ranks[0].header)}",
            )
    count = min(len(r.calls) for r in ranks)  # a killed process may have written fewer calls
    collective = [np.isin(r.calls["op"][:count], COLLECTIVE) for r in ranks]
    before = np.array(
        [np.concatenate([[0], c.cumsum()]) for c in collective]
    )  # collective calls before each call
    count = int(np.flatnonzero((before == before[0]).all(0))[-1])
    for file, r, own in zip(files, ranks, collective):
        r.calls = r.calls[:count]
        for name in ("op", "plan", "cached", "layout", "alignment", "capacity"):
            found, first = r.calls[name][own[:count]], ranks[0].calls[name][collective[0][:count]]
            if (found != first).any():
                refuse(
                    _OP,
                    file,
                    f"calls.{name}",
                    f"differs from rank 0 in collective call {int((found != first).argmax())}",
                    "the same calls on every rank",
                )
    # A rank without tokens records no weights, even if the call has some on other ranks.
    if len({tuple(r.calls["op"]) for r in ranks}) == 1:
        weighted = np.any([r.calls["weighted"] for r in ranks], axis=0)
        for r in ranks:
            r.calls["weighted"] |= weighted & (r.calls["tokens"] == 0)


def _header(file: Any, array: Any) -> Any:
    def wrong(name: str, value: Any, expected: Any) -> None:
        refuse(_OP, file, f"header.{name}", f"is {spelled(value)}", expected)

    try:
        if array.dtype.kind != "U" or array.shape or array.dtype.itemsize > 4 * _MOST_TEXT:
            raise ValueError(f"{array.dtype} {list(array.shape)}")
        header = json.loads(str(array))
    except (ValueError, RecursionError) as error:
        refuse(
            _OP,
            file,
            "header",
            f"cannot be read ({type(error).__name__}: {spelled(str(error))})",
            "JSON text",
        )
    if not isinstance(header, dict):
        refuse(_OP, file, "header", f"is {spelled(header)}", "a JSON object")
    if header.get("format") != FORMAT or isinstance(header["format"], bool):
        wrong("format", header.get("format"), f"{FORMAT}")
    ints = dict(
        rank=(0, 99999),
        size=(1, 65535),
        ranks_per_node=(1, 65535),
        hidden=(1, _MOST_HIDDEN),
        num_experts=(1, 65535),
        top_k=(1, 65535),
        max_tokens=(1, 1 << 24),
        channels=(1, 1024),
    )
    for name, (low, high) in ints.items():
        value = header.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            wrong(name, value, f"an int in {low}..{high}")
    dtype = header.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        wrong("dtype", dtype, f"one of {', '.join(_DTYPES)}")
    if not isinstance(header.get("version"), str):
        wrong("version", header.get("version"), "a string")
    if header["rank"] >= header["size"]:
        wrong("rank", header["rank"], f"less than size, {header['size']}")
    if header["size"] % header["ranks_per_node"]:
        wrong("ranks_per_node", header["ranks_per_node"], f"a divisor of size, {header['size']}")
    shape: Any = [header[name] for name in ("hidden", "num_experts", "top_k", "max_tokens")]
    try:
        check_shape(  # type: ignore[call-arg]
            header["size"], *shape, _DTYPES[dtype], 20, header["channels"], header["rank"]
        )
    except InvalidArgument as error:
        refuse(_OP, file, "header", f"describes no valid Buffer ({error})", "valid arguments of a Buffer")
    needed = arena_size(header["size"], *shape, _DTYPES[dtype])  # type: ignore[call-arg]
    if needed >= _MOST_BYTES:
        refuse(_OP, file, "header", f"needs {needed} bytes", f"a Buffer of less than {_MOST_BYTES} bytes")
    return {name: header[name] for name in ("format", "version", *ints, "dtype")}


def _check_calls(file: Any, calls: Any, header: Any) -> None:
    def all_of(ok: Any, name: str, expected: Any) -> None:
        if not ok.all():
            i = int(np.flatnonzero(~ok)[0])
            refuse(_OP, file, f"calls[{i}].{name}", f"is {_shown(calls[name], i)}", expected)

    for name in ("cached", "weighted"):
        all_of(np.ascontiguousarray(calls[name]).view(np.uint8) <= 1, name, "True or False")
    all_of(np.isin(calls["op"], OPS), "op", f"one of {', '.join(OPS)}")
    all_of(np.isin(calls["layout"], ("expert", "rank")), "layout", "expert or rank")
    all_of((calls["layout"] == "expert") | ~np.isin(calls["op"], DECODE_OPS), "layout", "expert in decode")
    codings = {op: list(QUANTS) for op in ("dispatch", "decode_dispatch")} | {
        op: list(WIRES) for op in ("combine", "decode_combine")
    }
    for op in OPS:
        known = ["" if c is None else c for c in codings.get(op, [None])]
        usable = known[:1] if header["dtype"] == "float64" else known  # float64 rows are never quantized
        all_of((calls["op"] != op) | np.isin(calls["coding"], usable), "coding", f"one of {usable} in {op}")
    quantized = np.isin(calls["op"], ("dispatch", "decode_dispatch")) & (calls["coding"] != "")
    all_of(
        ~quantized | (header["hidden"] % 16 == 0), "coding", "none, because hidden is not a multiple of 16"
    )
    all_of(
        (calls["tokens"] >= 0) & (calls["tokens"] <= header["max_tokens"]),
        "tokens",
        f"0..{header['max_tokens']}",
    )
    all_of((calls["alignment"] >= 1) & (calls["alignment"] <= 65536), "alignment", "1..65536")
    all_of((calls["layout"] != "rank") | (calls["alignment"] == 1), "alignment", "1 in the rank layout")
    all_of((calls["capacity"] >= -1) & (calls["capacity"] < 1 << 31), "capacity", "-1 (none) or 0..2**31-1")
    all_of(calls["phases"] >= 0, "phases", "a number >= 0")
    all_of(calls["begin_ns"] >= 0, "begin_ns", "nanoseconds >= 0")
    all_of(calls["end_ns"] >= calls["begin_ns"], "end_ns", "a time not before begin_ns")
    for name in HOPS:
        all_of(calls[name] < _MOST_BYTES, name, f"less than {_MOST_BYTES}")


def _check_phases(file: Any, phases: Any) -> None:
    for name, ok, expected in (
        ("role", np.isin(phases["role"], [role[:8] for role in core.ROLES]), "a role"),
        ("begin", np.isfinite(phases["begin"]), "seconds"),
        ("end", np.isfinite(phases["end"]) & (phases["end"] >= phases["begin"]), "seconds, not before begin"),
    ):
        if not ok.all():
            i = int(np.flatnonzero(~ok)[0])
            refuse(_OP, file, f"phases[{i}].{name}", f"is {_shown(phases[name], i)}", expected)


def _check_ids(file: Any, ids: Any, num_experts: int) -> None:
    if error := picks_error(ids, num_experts):
        refuse(_OP, file, *error)


def picks_error(ids: Any, num_experts: int) -> Any:
    """Find the first row of ids [T, top_k] with invalid picks: (field, text of the value, expected), or None."""
    wrong = (ids < -1) | (ids >= num_experts)
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        return f"ids[{row}, {column}]", f"is {ids[row, column]}", f"-1 or an expert in 0..{num_experts - 1}"
    ordered = np.sort(ids, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        row = int(np.argwhere(twice)[0][0])
        return f"ids[{row}]", f"is {ids[row].tolist()}", "distinct experts per token"
    return None


def _shown(column: Any, i: Any) -> Any:
    try:
        return spelled(column[i].item())
    except ValueError:  # an invalid Unicode string
        return "not a valid string"
