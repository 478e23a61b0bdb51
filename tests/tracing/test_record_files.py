"""Files of a recording: only files of a recording are removed, links are not followed, a full disk is harmless."""

import json
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture

import moecomm
from moecomm import record
from moecomm.errors import RecordingIncomplete


def buffer(comm, folder):
    return moecomm.Buffer(comm, hidden=64, num_experts=8, top_k=2, max_tokens=8, record=folder)


def step(buf):
    out = buf.dispatch(
        torch.zeros((4, 64), dtype=torch.bfloat16), torch.tensor([[0, 1]] * 4, dtype=torch.int64)
    )
    buf.combine(out.handle.rows, out.handle)


@pytest.fixture
def comm():
    c = moecomm.Communicator()
    yield c
    c.close()


def test_files_are_their_owners(comm, tmp_path):
    before = os.umask(0)
    try:
        buf = buffer(comm, tmp_path / "rec")
        step(buf)
        buf.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "rec").stat().st_mode) == 0o700
    assert [(f.name, stat.S_IMODE(f.stat().st_mode)) for f in (tmp_path / "rec").iterdir()] == [
        ("rank-00000.000.npz", 0o600)
    ]


def test_an_earlier_recording_is_replaced(comm, tmp_path):
    """Also the files of a killed recording; files with other names stay."""
    folder = tmp_path / "rec"
    first = buffer(comm, folder)
    step(first)
    first.backend.recorder.segments.write()
    step(first)
    first.close()
    assert len(list(folder.iterdir())) == 2
    whole = (folder / "rank-00000.001.npz").read_bytes()
    (folder / "rank-00000.002.partial").write_bytes(whole[: len(whole) // 2])
    (folder / "rank-00000.003.0123456789abcdef.partial").write_bytes(b"")
    (folder / "rank-00001.000.npz").write_bytes(whole)  # of a larger world
    (folder / "rank-00000.notes.txt").write_text("notes")
    second = buffer(comm, folder)
    step(second)
    second.close()
    assert sorted(f.name for f in folder.iterdir()) == ["rank-00000.000.npz", "rank-00000.notes.txt"]
    assert [len(r.calls) for r in record.load(folder)] == [2]


@pytest.mark.parametrize(
    "name,make",
    [
        ("rank-00000.000.npz", lambda f: f.write_text("my data")),
        ("rank-00000.000.npz", lambda f: np.savez(f, ids=np.zeros(3))),
        ("rank-00000.000.npz", lambda f: f.symlink_to(f.parent.parent / "victim")),
        ("rank-00000.000.npz", lambda f: f.mkdir()),
        ("rank-00000.000.npz", os.mkfifo),
        ("rank-00000.000.partial", lambda f: f.write_text("my data")),
        ("rank-00000.000.partial", lambda f: f.symlink_to(f.parent.parent / "victim")),
    ],
)
def test_files_of_somebody_else_are_refused(comm, tmp_path, name, make):
    folder, victim = tmp_path / "rec", tmp_path / "victim"
    victim.write_text("precious")
    folder.mkdir()
    make(folder / name)
    before = sorted((f.name, f.lstat().st_mode, f.lstat().st_size) for f in folder.iterdir())
    with pytest.raises(
        moecomm.InvalidArgument, match=f"record is .*contains '{name}'.*expected an empty folder"
    ):
        buffer(comm, folder)
    assert sorted((f.name, f.lstat().st_mode, f.lstat().st_size) for f in folder.iterdir()) == before
    assert victim.read_text() == "precious"
    buffer(comm, tmp_path / "other").close()  # the communicator still works


def test_files_that_appear_meanwhile_are_not_touched(comm, tmp_path):
    """Links named like the partial file or the next segment, also dangling ones, stay unchanged."""
    folder, victim = tmp_path / "rec", tmp_path / "victim"
    victim.write_text("precious")
    buf = buffer(comm, folder)
    step(buf)
    for name in ("rank-00000.partial", "rank-00000.000.partial", "rank-00000.000.npz"):
        (folder / name).symlink_to(victim)
    (folder / "rank-00000.001.npz").symlink_to(tmp_path / "nowhere")
    buf.close()
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()
    assert (folder / "rank-00000.002.npz").is_file(), "under the next name that is free"


def test_a_folder_that_was_swapped(comm, tmp_path):
    """Another folder under the recording's path, or a new working folder, gets no files."""
    folder = tmp_path / "rec"
    buf = buffer(comm, folder)
    step(buf)
    folder.rename(tmp_path / "moved")
    (tmp_path / "trap").mkdir()
    folder.symlink_to(tmp_path / "trap")
    buf.close()
    assert not list((tmp_path / "trap").iterdir()) and [f.name for f in (tmp_path / "moved").iterdir()] == [
        "rank-00000.000.npz"
    ]


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    "value",
    [
        3,
        [],
        {},
        b"x",
        "a\0b",
        "",
        2**70,
        float("nan"),
        torch.zeros(2),
        np.zeros(2),
        Unprintable(),
        "/proc/self/nonsuch",
        "/dev/null",
    ],
    ids=lambda v: type(v).__name__,
)
def test_odd_paths(comm, value):
    with pytest.raises(moecomm.InvalidArgument, match=r"record is .*expected a"):
        buffer(comm, value)


SCRIPT = """
import gc, json, os, resource, signal, sys, warnings
import torch, moecomm
from moecomm import recorder
recorder.LOOK_SECONDS = 0.01
mapped = lambda: sum("memfd:moecomm" in line for line in open("/proc/self/maps"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
comm = moecomm.Communicator()
results = []
for how in ("close", "segments", "error"):
    folder, before = os.path.join(sys.argv[1], how), mapped()
    buf = moecomm.Buffer(comm, hidden=64, num_experts=8, top_k=2, max_tokens=512, record=folder)
    during, limit = mapped(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))   # as on a full disk: writing more is an error
    for _ in range(20):
        ids = torch.tensor([[0, 1]] * 512, dtype=torch.int64)
        out = buf.dispatch(torch.zeros((512, 64), dtype=torch.bfloat16), ids)
        buf.combine(out.handle.rows, out.handle)
    del out
    said = []
    with warnings.catch_warnings(record=how != "error") as caught:
        warnings.simplefilter("error" if how == "error" else "always")
        if how == "segments":
            buf.backend.recorder.segments.write()
        for _ in range(2):
            try:
                buf.close()
            except Warning as warning:
                said.append(str(warning))
    said += [str(w.message) for w in caught or []]
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    del buf
    gc.collect()
    results.append([how, said, before < during, mapped() == before, os.listdir(folder)])
print(json.dumps(results))
"""


def test_a_full_disk(tmp_path):
    """Everything is released, no partial file stays, and there is one warning, also if warnings are errors."""
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for how, said, was_mapped, released, left in json.loads(ran.stdout):
        assert was_mapped and released and left == [], how
        assert (
            len(said) == 1
            and "ends early on rank 0, after 0 segments" in said[0]
            and "File too large" in said[0]
        ), how


def test_what_was_written_before_is_kept(comm, tmp_path, monkeypatch):
    """A recording that ends early can be replayed to its end, and memory stops growing."""
    folder = tmp_path / "rec"
    buf = buffer(comm, folder)
    step(buf)
    buf.backend.recorder.segments.write()
    monkeypatch.setattr(
        buf.backend.recorder.segments._folder,
        "_make",
        lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    step(buf)
    buf.backend.recorder.segments.write()
    step(buf)
    with pytest.warns(RecordingIncomplete, match="after 1 segments .*No space left"):
        buf.close()
    assert len(record.load(folder)[0].calls) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buf.close()


def test_a_forked_child_writes_nothing(tmp_path):
    code = f"""
import os, sys, torch, moecomm
buf = moecomm.Buffer(moecomm.Communicator(), hidden=64, num_experts=8, top_k=2, max_tokens=8, record={str(tmp_path)!r})
if os.fork() == 0:
    sys.exit(0)   # runs what is to run at the end of a process
os.wait()
print(sorted(os.listdir({str(tmp_path)!r})))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert ran.stdout.strip() == "[]" and ran.returncode == 0, ran.stderr
    assert os.listdir(tmp_path) == ["rank-00000.000.npz"]


def test_the_gpus_recorder(either_world, tmp_path, monkeypatch):  # noqa: F811
    """In both worlds, a failed recording gives one warning, and the buffer is released."""

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=64, num_experts=8, top_k=2, max_tokens=8, record=tmp_path / "rec")
        segments = buf.backend.recorder.segments
        segments._folder.close()
        step(buf)
        comm.barrier()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            buf.close()
        return [str(w.message) for w in caught if issubclass(w.category, RecordingIncomplete)]

    (said,) = moecomm.run_local(main, 1)
    assert len(said) == 1 and "ends early" in said[0]
