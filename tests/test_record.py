"""Recording and replay: what was moved moves again, to the digit, in the cpu and the sim world."""

import json

import numpy as np
import pytest
import torch
from worlds import random_world

import moecomm
from moecomm import __main__ as command
from moecomm import record, replay

SIZE, PER_NODE, HIDDEN, EXPERTS, TOP_K = 4, 2, 64, 16, 4


@pytest.fixture
def recording(tmp_path):
    """Two layers' worth of calls: two plans, one of them reused, both layouts, combine with and without weights."""
    worlds = [random_world(SIZE, [5, 0, 9, 7], HIDDEN, EXPERTS, TOP_K, seed=s) for s in (1, 2)]

    def main(comm):
        r = comm.rank
        buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=9, record=tmp_path / "rec")
        (xs, ids, weights), (xs2, ids2, _) = worlds
        out = buf.dispatch(xs[r], ids[r], weights[r], expert_alignment=4)
        buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights)
        first = buf.stats()   # resets the counters, not the recording
        again = buf.dispatch(xs2[r], handle=out.handle, quant="fp8")
        buf.combine(again.handle.rows, again.handle, wire="logfmt10")
        by_rank = buf.dispatch(xs2[r], ids2[r].to(torch.int32), layout="rank", capacity=40)
        buf.combine(by_rank.handle.rows, by_rank.handle)
        second = buf.stats()
        comm.barrier()
        buf.close()
        return {hop: {k: first[hop][k] + second[hop][k] for k in first[hop]} for hop in ("rail", "node")}

    return tmp_path / "rec", worlds, moecomm.run_local(main, SIZE, ranks_per_node=PER_NODE)


def test_what_is_recorded(recording):
    path, worlds, stats = recording
    ranks = record.load(path)
    assert [r.header["rank"] for r in ranks] == list(range(SIZE))
    for rank, r in enumerate(ranks):
        assert r.calls["op"].tolist() == ["dispatch", "combine"] * 3
        assert r.calls["plan"].tolist() == [0, 0, 0, 0, 1, 1] and r.calls["cached"].tolist() == [False, True, True, True, False, True]
        assert r.calls["coding"].tolist() == ["", "", "fp8", "logfmt10", "", ""]
        assert (r.calls["end_ns"] > r.calls["begin_ns"]).all()
        assert r.calls["phases"].sum() == len(r.phases) and (r.calls["phases"] > 0).all()
        first = r.phases[:r.calls["phases"][0]]
        assert first["role"][0] == "plan" and first["role"][-1] == "arrive" and (first["end"] >= first["begin"]).all()
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
    assert said["equal"] and said["recorded"] == said["replayed"] and said["recorded"]["rail_physical_rows"] > 0


@pytest.mark.parametrize("world", ["cpu", "sim"])
def test_replay_on_other_ranks(recording, world, capsys):
    assert command.main(["replay", str(recording[0]), "--world", world, "--ranks", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ranks"] == 2 and not said["equal"]
    # One node of two ranks: nothing crosses the rail.
    assert said["replayed"]["rail_physical_rows"] == 0 < said["replayed"]["node_physical_rows"]


def test_a_changed_recording_is_found(recording, capsys):
    path = recording[0]
    file = path / "rank-00002.000.npz"
    with np.load(file) as archive:
        parts = {name: archive[name] for name in archive.files}
    parts["ids"][0] = (parts["ids"][0] + 5) % EXPERTS   # another routing of one token
    np.savez(file, **parts)
    assert command.main(["replay", str(path), "--world", "cpu"]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_segments(recording, monkeypatch):
    """A recording in many files reads like one."""
    path, whole = recording[0], record.load(recording[0])
    monkeypatch.setattr(record, "SEGMENT_BYTES", 1)
    script = replay.script_of(whole)

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=9, record=path)
        for plan in (0, 1):
            out = buf.dispatch(torch.zeros(len(script.ids[plan][comm.rank]), HIDDEN).bfloat16(), script.ids[plan][comm.rank])
            buf.combine(out.handle.rows, out.handle)
        comm.barrier()
        buf.close()

    moecomm.run_local(main, SIZE, ranks_per_node=PER_NODE)
    assert len(list(path.glob("rank-00001.*.npz"))) == 4   # one per call
    for a, b in zip(record.load(path), whole):
        assert len(b.calls) == 6 and len(a.calls) == 4
        assert all(np.array_equal(i, j) for i, j in zip(a.ids, b.ids))


def test_errors(tmp_path):
    with pytest.raises(moecomm.InvalidArgument, match="recording: .*holds no rank"):
        record.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(moecomm.InvalidArgument, match="record is .*expected a folder"):
        moecomm.Buffer(moecomm.Communicator(), hidden=64, num_experts=4, top_k=2, max_tokens=4, record=tmp_path / "file")
