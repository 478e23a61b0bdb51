"""500 damaged recordings and cluster tables: each works or is refused by name, without a crash or a hang."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import mutants
import numpy as np
import pytest

import moecomm
from moecomm import archives, record, replay

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"


@pytest.mark.parametrize(
    "kind,first,number", [("recording", 0, 200), ("recording", 200, 200), ("table", 0, 100)]
)
def test_mutants(kind, first, number, tmp_path):
    ran = subprocess.run(
        [
            sys.executable,
            "-X",
            "faulthandler",
            SUPPORT / "mutants_worker.py",
            kind,
            str(first),
            str(number),
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=SUPPORT,
        env=environment(),
        check=False,
    )
    said = ran.stdout.splitlines()
    assert ran.returncode == 0, f"mutant {said[-1:]}: status {ran.returncode}\n{ran.stderr[-3000:]}"
    outcomes = json.loads(said[-1].partition(" ")[2])
    assert sum(outcomes.values()) == number
    # Most damage is detected; some is harmless.
    assert (
        outcomes["refused"] > number / 2
        and outcomes.get("replayed", 0) + outcomes.get("simulated", 0) > number / 20
    ), outcomes


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{SUPPORT}"}


@pytest.fixture
def recording(tmp_path):
    mutants.good_recording(tmp_path / "rec")
    return tmp_path / "rec"


@contextlib.contextmanager
def change(recording, name="rank-00000.000.npz"):
    """Change parts of a segment, which are written back at the end."""
    with np.load(recording / name) as archive:
        parts = {k: archive[k].copy() for k in archive.files}
    yield parts
    np.savez(recording / name, **parts)


@pytest.mark.parametrize(
    "field,value",
    [
        ("op", "decode_sum"),
        ("op", "x"),
        ("plan", 1),
        ("plan", -1),
        ("plan", 2**62),
        ("cached", True),
        ("tokens", 100),
        ("tokens", -1),
        ("tokens", 2),
        ("layout", "x"),
        ("layout", "rank"),
        ("alignment", 0),
        ("alignment", 2**30),
        ("capacity", -2),
        ("capacity", 2**40),
        ("coding", "logfmt10"),
        ("coding", "x"),
        ("begin_ns", -1),
        ("end_ns", 0),
        ("phases", -1),
        ("phases", 2**31 - 1),
        ("rail_logical_rows", 2**63),
    ],
)
def test_a_field_of_a_call(recording, field, value):
    """The first call is a dispatch, the second one its combine."""
    with change(recording) as parts:
        parts["calls"][field][0] = value
    with pytest.raises(
        moecomm.InvalidArgument,
        match=rf"^recording: .*rank-00000.000.npz.*calls.*(\.{field}|tokens|layout|plan|phases)",
    ):
        record.load(recording)


@pytest.mark.parametrize(
    "field,value,expected",
    [
        ("size", 0, "1..65535"),
        ("size", 2**70, "1..65535"),
        ("ranks_per_node", 0, "1..65535"),
        ("hidden", 7, "16 bytes"),
        ("hidden", 2**40, "an int"),
        ("num_experts", -8, "an int"),
        ("num_experts", 7, "multiple"),
        ("top_k", 64, "1..8"),
        ("max_tokens", None, "an int"),
        ("channels", True, "an int"),
        ("dtype", "int8", "one of"),
        ("dtype", [], "one of"),
        ("format", 1, "2"),
        ("format", float("nan"), "2"),
        ("version", 3, "string"),
        ("rank", 1, "rank 0"),
    ],
)
def test_a_field_of_the_header(recording, field, value, expected):
    with change(recording) as parts:
        parts["header"] = np.array(json.dumps(json.loads(str(parts["header"])) | {field: value}))
    with pytest.raises(
        moecomm.InvalidArgument, match=rf"^recording: .*rank-00000.000.npz.*header.*{expected}"
    ):
        record.load(recording)


@pytest.mark.parametrize(
    "damage,expected",
    [
        (lambda p: p.update(ids=p["ids"][:1]), "ids has"),
        (lambda p: p.update(weights=p["weights"][:1]), "weights has"),
        (lambda p: p["ids"].__setitem__((0, 0), 30000), r"ids\[0, 0\] is 30000"),
        (lambda p: p["ids"].__setitem__((0, 1), -2), "ids"),
        (lambda p: p["ids"].__setitem__(slice(None), 3), "distinct"),
        (lambda p: p.update(ids=p["ids"].astype(np.int64)), "ids is"),
        (lambda p: p["phases"]["begin"].__setitem__(0, np.nan), "begin"),
        (lambda p: p["phases"]["role"].__setitem__(0, "x"), "role"),
        (lambda p: p.update(calls=p["calls"][:0], phases=p["phases"][:0]), "plan"),
        (lambda p: p.pop("ids"), "contains"),
        (lambda p: p.update(more=p["ids"]), "contains"),
    ],
)
def test_an_array(recording, damage, expected):
    with change(recording) as parts:
        damage(parts)
    with pytest.raises(moecomm.InvalidArgument, match=f"^recording: .*rank-0000.*{expected}"):
        record.load(recording)


def test_claims_are_not_believed(tmp_path):
    """An array with a claimed size of 2**60 elements allocates no memory."""
    file = tmp_path / "a.npy"
    np.save(file, np.zeros(4))
    raw = file.read_bytes()
    file.write_bytes(
        raw.replace(b"'shape': (4,), }                   ", b"'shape': (1152921504606846976,), } ", 1)
    )
    assert file.read_bytes() != raw
    with pytest.raises(
        moecomm.InvalidArgument, match=r"--x: .*a.npy.*claims to be float64.*1152921504606846976"
    ):
        archives.read_array("--x", file)
    np.savez_compressed(tmp_path / "a.npz", ids=np.zeros(1 << 20))
    with pytest.raises(moecomm.InvalidArgument, match=r"a.npz.*uncompressed"):
        archives.read_archive("--x", tmp_path / "a.npz", ("ids",))


def test_more_ranks_than_threads(recording):
    script = replay.script_of(record.load(recording))
    script.size = 4096
    with pytest.raises(moecomm.InvalidArgument, match=r"--ranks is 4096.*512"):
        replay.on_cpu(script)
