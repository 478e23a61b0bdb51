"""Damaged recordings and cluster tables by seed: bit flips, truncations, swapped fields, odd and huge values."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
from worlds import random_world

import moecomm

SIZE, HIDDEN, EXPERTS, TOP_K = 2, 64, 8, 2
INTEGERS = (-1, 0, 1, 2, 7, 100, -(2**31), 2**31 - 1, 2**40, 2**62, 2**63 - 1, -(2**63))
REALS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300, -1e300, 1e-320)
TEXTS = (
    "",
    "x",
    "dispatch",
    "combine",
    "decode_sum",
    "decode_combine",
    "decode_receive",
    "decode_dispatch",
    "rank",
    "expert",
    "fp8",
    "logfmt10",
    "\U0010ffff\0y",
)
ODD = (
    None,
    True,
    [],
    {},
    "x",
    "64",
    math.nan,
    math.inf,
    -1,
    0,
    1,
    3,
    1.5,
    2**31,
    2**63,
    2**70,
    -(2**70),
    [1],
    {"a": 1},
)


def good_recording(folder):
    """Record two ranks with both paths: reused plans, both layouts, a quantized call, weights that dispatch sends."""
    xs, ids, weights = random_world(SIZE, [3, 4], HIDDEN, EXPERTS, TOP_K, seed=7)

    def main(comm):
        r = comm.rank
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=4, record=folder
        )
        out = buf.dispatch(xs[r], ids[r], weights[r])
        buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights)
        buf.backend.recorder.segments.write()
        again = buf.dispatch(xs[r], handle=out.handle, quant="fp8")
        buf.combine(again.handle.rows, again.handle)
        by_rank = buf.dispatch(xs[r], ids[r], layout="rank", capacity=40)
        buf.combine(by_rank.handle.rows, by_rank.handle)
        recv, hook = buf.decode_dispatch(xs[r], ids[r], topk_weights=weights[r])
        hook()
        buf.decode_combine(recv.handle.rows, ids[r], None, recv.handle, return_hook=False)
        comm.barrier()
        buf.close()

    moecomm.run_local(main, SIZE)


def damage(folder, rng):
    """Make one change in one file of a recording, or in one file of each rank; return a description."""
    files = sorted(f for f in folder.glob("rank-*.npz") if f.is_file())
    if not files:
        return "nothing is left"
    file = rng.choice(files)
    kind = rng.choice(["raw", "calls", "calls", "calls", "array", "array", "header", "header", "claim"])
    changed = [file]
    if (
        kind in ("calls", "array", "header") and rng.random() < 0.5
    ):  # each rank's file is consistent by itself
        changed = files if kind == "header" else [f for f in files if f.name[-8:] == file.name[-8:]]
    state, what = rng.getstate(), ""
    for one in changed:
        rng.setstate(state)
        what = _damage_one(one, kind, files, rng)
    return f"{file.name if len(changed) == 1 else 'all'}: {what}"


def _damage_one(file, kind, files, rng):
    try:
        with np.load(file) as archive:
            parts = {name: archive[name].copy() for name in archive.files}
        json.loads(str(parts["header"]))
    except Exception:  # already damaged
        kind = "raw"
    if kind == "raw":
        return _raw(file, files, rng)
    what = {"calls": _calls, "array": _array, "header": _header, "claim": lambda p, r: _claim(file, p, r)}[
        kind
    ](parts, rng)
    if kind != "claim":
        with open(file, "wb") as out:
            np.savez(out, **parts)
    return what


def _raw(file, files, rng):
    data = bytearray(file.read_bytes())
    how = rng.choice(
        [
            "flip",
            "flip",
            "cut",
            "zero",
            "insert",
            "empty",
            "text",
            "swap",
            "remove",
            "repeat",
            "rename",
            "folder",
        ]
    )
    if how == "flip":
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
    elif how == "zero":
        at = rng.randrange(len(data))
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif how == "insert":
        at = rng.randrange(len(data))
        data[at:at] = bytes(rng.randrange(256) for _ in range(16))
    elif how in ("empty", "text"):
        data = bytearray() if how == "empty" else bytearray(b"no archive\n" * 100)
    if how in ("swap", "repeat"):
        other = rng.choice(files)
        mine, its = file.read_bytes(), other.read_bytes()
        file.write_bytes(its)
        if how == "swap":
            other.write_bytes(mine)
        return f"{how} with {other.name}"
    if how in ("remove", "rename", "folder"):
        if how == "rename":
            file.rename(
                file.with_name(
                    rng.choice(
                        ["rank-00000.007.npz", "rank-00005.000.npz", "rank-99999.000.npz", "rank-x.npz"]
                    )
                )
            )
        else:
            file.unlink()
            if how == "folder":
                file.mkdir()
        return how
    file.write_bytes(bytes(data))
    return how


def _calls(parts, rng):
    calls = parts["calls"]
    if not len(calls):
        return "no calls"
    how, i = (
        rng.choice(["set", "set", "set", "set", "exchange", "drop", "repeat", "reverse"]),
        rng.randrange(len(calls)),
    )
    if how == "exchange":
        j = rng.randrange(len(calls))
        calls[[i, j]] = calls[[j, i]]
    elif how == "drop":
        parts["calls"] = np.delete(calls, i)
    elif how == "repeat":
        parts["calls"] = np.repeat(calls, rng.choice([2, 3]), axis=0)
    elif how == "reverse":
        parts["calls"] = calls[::-1].copy()
    if how != "set":
        return f"calls {how} {i}"
    name = rng.choice(calls.dtype.names)
    column = calls[name]
    return f"calls[{i}].{name} = {_put(column, i, rng)!r}"


def _put(column, i, rng):
    kind = column.dtype.kind
    if kind == "b":
        value = rng.choice([0, 1, 2, 255])
        column.view(np.uint8)[i] = value
        return value
    value = rng.choice({"U": TEXTS, "f": REALS}.get(kind, INTEGERS))
    if kind in "iu":
        info = np.iinfo(column.dtype)
        value = min(max(value, info.min), info.max)
    column[i] = value
    return value


def _array(parts, rng):
    name = rng.choice(["ids", "weights", "phases", "calls"])
    a = parts[name]
    how = rng.choice(
        ["put", "put", "cut", "grow", "dtype", "shape", "gone", "more", "objects", "twice", "backwards"]
    )
    if how == "put" and a.size:
        if a.dtype.names:
            field = rng.choice(a.dtype.names)
            return f"{name}.{field} = {_put(a[field], rng.randrange(len(a)), rng)!r}"
        return f"{name} = {_put(a.reshape(-1), rng.randrange(a.size), rng)!r}"
    if how == "cut":
        parts[name] = a[: rng.randrange(len(a) + 1)]
    elif how == "grow":
        parts[name] = np.concatenate([a, a])
    elif how == "dtype":
        parts[name] = np.zeros(a.shape, rng.choice(["f8", "i8", "u1", "c16", "U3", "V7", ">i2"]))
    elif how == "shape":
        parts[name] = rng.choice([a[None], a[..., None], a.reshape(-1), a[:0]])
    elif how == "gone":
        del parts[name]
    elif how == "more":
        parts["more"] = a
    elif how == "objects":
        parts[name] = np.array([{}, None], dtype=object)
    elif how == "twice" and a.ndim == 2 and len(a):
        a[:, :] = a[:, :1]
    elif how == "backwards":
        parts[name] = np.asfortranarray(a[::-1])
    return f"{name} {how}"


def _header(parts, rng):
    header = json.loads(str(parts["header"]))
    name = rng.choice(sorted(header))
    how = rng.choice(
        ["set", "set", "set", "set", "drop", "exchange", "deep", "text", "bytes", "list", "long"]
    )
    if how == "set":
        header[name] = rng.choice([*ODD, header[name] * 2])
        how = f"{name} = {header[name]!r}"
    elif how == "drop":
        del header[name]
    elif how == "exchange":
        other = rng.choice(sorted(header))
        header[name], header[other] = header[other], header[name]
        how = f"{name} and {other} exchanged"
    text = {
        "deep": "[" * 9000 + "]" * 9000,
        "text": "{",
        "list": "[]",
        "long": json.dumps(header) + " " * 10**6,
    }.get(how, json.dumps(header))
    parts["header"] = np.frombuffer(text.encode(), np.uint8) if how == "bytes" else np.array(text)
    return f"header {how}"


def _claim(file, parts, rng):
    """Write a wrong shape in an array's own header."""
    name, shape = (
        rng.choice(["ids", "weights", "phases", "calls"]),
        rng.choice([(2**60,), (2**31, 2**31), (-1,), (0,), (10**9, 2), (2**63,), (1, 1, 1, 1)]),
    )
    real = np.lib.format.header_data_from_array_1_0

    def lying(array):
        found = real(array)
        return (
            dict(found, shape=shape)
            if array.dtype == parts[name].dtype and array.shape == parts[name].shape
            else found
        )

    np.lib.format.header_data_from_array_1_0 = np.lib._format_impl.header_data_from_array_1_0 = lying
    try:
        with open(file, "wb") as out:
            np.savez(out, **parts)
    except Exception as error:  # NumPy itself refuses to write this shape
        return f"{name} claims {shape}: not written ({type(error).__name__})"
    finally:
        np.lib.format.header_data_from_array_1_0 = np.lib._format_impl.header_data_from_array_1_0 = real
    return f"{name} claims {shape}"


def damaged_copy(good, folder, rng):
    """Make a fresh copy and damage it; return (folder, description)."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    return "; ".join(damage(folder, rng) for _ in range(rng.choice([1, 1, 1, 2])))


def damaged_table(text, rng):
    """Make one change in a cluster's table; return (text or bytes, description)."""
    lines = text.splitlines()
    how = rng.choice(
        ["value", "value", "value", "value", "flip", "cut", "key", "twice", "deep", "drop", "binary", "type"]
    )
    at = rng.choice([i for i, line in enumerate(lines) if " = " in line and not line.startswith("#")])
    key = lines[at].partition(" = ")[0]
    if how == "value":
        value = rng.choice(
            [
                "nan",
                "inf",
                "-inf",
                "-1",
                "0",
                "1e308",
                "1e-320",
                "-0.0",
                "true",
                '"x"',
                "[]",
                "{}",
                "[1.0]",
                str(2**70),
                "1979-05-27",
                "0x7fffffffffffffff",
            ]
        )
        lines[at], how = f"{key} = {value}", f"{key} = {value}"
    elif how == "key":
        lines[at] = f"{key}x = 1.0"
    elif how == "twice":
        lines.insert(at, lines[at])
    elif how == "deep":
        lines[at] = f"{key} = {'[' * 5000}{']' * 5000}"
    elif how == "drop":
        del lines[at]
    elif how == "type":
        lines = [
            line.replace("[hardware]", rng.choice(["[[hardware]]", "hardware = 3", "[hardware.deep]", ""]))
            for line in lines
        ]
    raw = bytearray("\n".join(lines).encode())
    if how == "flip":
        for _ in range(4):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del raw[rng.randrange(len(raw)) :]
    elif how == "binary":
        raw = bytearray(rng.randrange(256) for _ in range(500))
    return bytes(raw), how
