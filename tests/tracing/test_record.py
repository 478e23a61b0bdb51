"""Recording and replay: the same traffic, exactly, in the cpu and the sim world."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture
from worlds import random_world

import moecomm
from moecomm import __main__ as command
from moecomm import record, recorder, replay

pytestmark = pytest.mark.usefixtures("either_world")

SIZE, PER_NODE, HIDDEN, EXPERTS, TOP_K = 4, 2, 64, 16, 4


@pytest.fixture
def recording(tmp_path):
    """Record two layers of calls: two plans, one reused, both layouts, combine with and without weights."""
    worlds = [random_world(SIZE, [5, 0, 9, 7], HIDDEN, EXPERTS, TOP_K, seed=s) for s in (1, 2)]

    def main(comm):
        r = comm.rank
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=9, record=tmp_path / "rec"
        )
        (xs, ids, weights), (xs2, ids2, _) = worlds
        out = buf.dispatch(xs[r], ids[r], weights[r], expert_alignment=4)
        buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights)
        first = buf.stats()  # resets the counters, not the recording
        again = buf.dispatch(xs2[r], handle=out.handle, quant="fp8")
        buf.combine(again.handle.rows, again.handle, wire="logfmt10")
        by_rank = buf.dispatch(xs2[r], ids2[r].to(torch.int32), layout="rank", capacity=40)
        buf.combine(by_rank.handle.rows, by_rank.handle)
        second = buf.stats()
        comm.barrier()
        buf.close()
        return {hop: {k: first[hop][k] + second[hop][k] for k in first[hop]} for hop in ("rail", "node")}

    return tmp_path / "rec", worlds, moecomm.run_local(main, SIZE, ranks_per_node=PER_NODE)


def test_what_is_recorded(recording, either_world):  # noqa: F811
    path, worlds, stats = recording
    ranks = record.load(path)
    assert [r.header["rank"] for r in ranks] == list(range(SIZE))
    for rank, r in enumerate(ranks):
        assert r.calls["op"].tolist() == ["dispatch", "combine"] * 3
        assert r.calls["plan"].tolist() == [0, 0, 0, 0, 1, 1] and r.calls["cached"].tolist() == [
            False,
            True,
            True,
            True,
            False,
            True,
        ]
        assert r.calls["coding"].tolist() == ["", "", "fp8", "logfmt10", "", ""]
        assert (r.calls["end_ns"] > r.calls["begin_ns"]).all()
        assert r.calls["phases"].sum() == len(r.phases)
        if either_world == "cpu":  # kernels record no timeline
            assert (r.calls["phases"] > 0).all()
            first = r.phases[: r.calls["phases"][0]]
            assert (
                first["role"][0] == "plan"
                and first["role"][-1] == "arrive"
                and (first["end"] >= first["begin"]).all()
            )
        for plan, (_, ids, _) in enumerate(worlds):
            assert np.array_equal(r.ids[plan], ids[rank].numpy())
        assert np.array_equal(r.weights[0], worlds[0][2][rank].numpy()) and r.weights[1] is None
        for hop in ("rail", "node"):
            for name, value in stats[rank][hop].items():
                assert r.calls[f"{hop}_{name}"].sum() == value


@pytest.mark.parametrize("world", ["cpu", "sim"])
def test_replay_moves_the_same(recording, world, capsys):
    assert command.main(["replay", str(recording[0]), "--world", world, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (
        said["equal"] and said["recorded"] == said["replayed"] and said["recorded"]["rail_physical_rows"] > 0
    )


@pytest.mark.parametrize("world", ["cpu", "sim"])
def test_replay_on_other_ranks(recording, world, capsys):
    assert command.main(["replay", str(recording[0]), "--world", world, "--ranks", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ranks"] == 2 and not said["equal"]
    # One node of two ranks: no row crosses the rail.
    assert said["replayed"]["rail_physical_rows"] == 0 < said["replayed"]["node_physical_rows"]


def test_a_changed_recording_is_found(recording, capsys):
    path = recording[0]
    file = path / "rank-00002.000.npz"
    with np.load(file) as archive:
        parts = {name: archive[name] for name in archive.files}
    parts["ids"][0] = (parts["ids"][0] + 5) % EXPERTS  # another routing of one token
    np.savez(file, **parts)
    assert command.main(["replay", str(path), "--world", "cpu"]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_segments(recording, monkeypatch, either_world):  # noqa: F811
    """A recording in many files reads like one; a thread writes full or old segments."""
    path, whole = recording[0], record.load(recording[0])
    monkeypatch.setattr(recorder, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(recorder, "LOOK_SECONDS", 0.001)
    script = replay.script_of(whole)

    def wait_until_taken(buf):
        deadline = time.monotonic() + 20
        while buf.backend.recorder.segments.source.nbytes and time.monotonic() < deadline:
            time.sleep(0.001)

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=9, record=path)
        for plan in (0, 1):
            out = buf.dispatch(
                torch.zeros(len(script.ids[plan][comm.rank]), HIDDEN).bfloat16(), script.ids[plan][comm.rank]
            )
            wait_until_taken(buf)
            buf.combine(out.handle.rows, out.handle)
            wait_until_taken(buf)
        comm.barrier()
        buf.close()

    moecomm.run_local(main, SIZE, ranks_per_node=PER_NODE)
    assert (
        len(list(path.glob("rank-00001.*.npz"))) == 4 or either_world != "cpu"
    )  # one file per call; on a GPU one per flush
    for a, b in zip(record.load(path), whole):
        assert len(b.calls) == 6 and len(a.calls) == 4
        assert all(np.array_equal(i, j) for i, j in zip(a.ids, b.ids))


def test_a_killed_process_leaves_what_it_wrote(tmp_path):
    """Whole segments, up to the last call that all ranks have written, can be replayed."""
    code = f"""
import os, torch, moecomm
def main(comm):
    buf = moecomm.Buffer(comm, hidden=64, num_experts=8, top_k=2, max_tokens=4, record={str(tmp_path)!r})
    for step in range(4):
        out = buf.dispatch(torch.zeros(4, 64).bfloat16(), torch.tensor([[step, 4 + step]] * 4))
        buf.combine(out.handle.rows, out.handle)
        if step < 2 or comm.rank == 0:
            buf.backend.recorder.segments.write()
    comm.barrier()
    os.kill(os.getpid(), 9)
moecomm.run_local(main, 2)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    ranks = record.load(tmp_path)
    assert [len(r.calls) for r in ranks] == [4, 4] and [len(r.ids) for r in ranks] == [2, 2]
    assert not list(tmp_path.glob("*.partial"))
    assert command.main(["replay", str(tmp_path), "--world", "sim"]) == 0


@pytest.fixture
def decode_recording(tmp_path):
    """Record decode steps: with and without weights, without a receive phase, and two steps interleaved."""

    def main(comm):
        r = comm.rank
        xs, ids, weights = random_world(SIZE, [5, 0, 9, 7], HIDDEN, EXPERTS, TOP_K, seed=3)
        x, ids, weights = xs[r], ids[r], weights[r]
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=9, record=tmp_path / "rec"
        )
        recv, hook = buf.decode_dispatch(x, ids)
        hook()
        buf.decode_combine(recv.handle.rows, ids, weights, recv.handle, return_hook=False)
        buf.decode_dispatch(
            x, ids.flip(0), topk_weights=weights, quant=None
        )  # without a separate receive call
        first, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
        _, finish = buf.decode_combine(first.handle.rows, ids, weights, first.handle, wire="fp8")
        second, hook = buf.decode_dispatch(x, ids, topk_weights=weights, quant="fp8_ue8m0")
        finish()
        hook()
        _third, hook = buf.decode_dispatch(x, ids, quant=None)
        _, finish = buf.decode_combine(
            second.handle.rows, ids, None, second.handle
        )  # of the dispatch before the last
        hook()
        finish()
        stats = buf.stats()["decode"]
        comm.barrier()
        buf.close()
        return ids, weights, stats

    return tmp_path / "rec", moecomm.run_local(main, SIZE, ranks_per_node=PER_NODE)


def test_decode_is_recorded(decode_recording):
    """Each phase is a call with its times; picks, weights and traffic are recorded."""
    path, ran = decode_recording
    for r, (ids, weights, stats) in zip(record.load(path), ran):
        assert r.calls["op"].tolist() == [
            "decode_dispatch",
            "decode_receive",
            "decode_combine",
            "decode_sum",
            "decode_dispatch",
            "decode_dispatch",
            "decode_receive",
            "decode_combine",
            "decode_dispatch",
            "decode_sum",
            "decode_receive",
            "decode_dispatch",
            "decode_combine",
            "decode_receive",
            "decode_sum",
        ]
        assert r.calls["plan"].tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 3, 2, 3, 4, 3, 4, 3]
        assert r.calls["coding"].tolist() == [
            "fp8",
            "",
            "",
            "",
            "",
            "",
            "",
            "fp8",
            "fp8_ue8m0",
            "",
            "",
            "",
            "",
            "",
            "",
        ]
        assert (r.calls["end_ns"] > r.calls["begin_ns"]).all() and (
            r.calls["begin_ns"][1:] >= r.calls["end_ns"][:-1]
        ).all()
        for plan, its in enumerate((ids, ids.flip(0), ids, ids, ids)):
            assert np.array_equal(r.ids[plan], its.numpy())
            assert r.weights[plan] is None if plan == 4 else np.array_equal(r.weights[plan], weights.numpy())
        for hop in ("rail", "node"):
            for name, value in stats[hop].items():
                assert r.calls[f"{hop}_{name}"].sum() == value


@pytest.mark.parametrize("world", ["cpu", "sim"])
def test_decode_replay_moves_the_same(decode_recording, world, capsys):
    assert command.main(["replay", str(decode_recording[0]), "--world", world, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (
        said["equal"] and said["recorded"] == said["replayed"] and said["recorded"]["rail_physical_rows"] > 0
    )
    assert set(said["median_us"]) == set(record.DECODE_OPS)


def test_errors(tmp_path):
    with pytest.raises(moecomm.InvalidArgument, match=r"recording: .*contains no rank"):
        record.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(moecomm.InvalidArgument, match=r"record is .*expected a writable folder"):
        moecomm.Buffer(
            moecomm.Communicator(), hidden=64, num_experts=4, top_k=2, max_tokens=4, record=tmp_path / "file"
        )
