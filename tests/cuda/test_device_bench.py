"""The GPU benchmark: its oracle, its candidates and its refusals without a GPU; all of it with one."""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from types import SimpleNamespace

import pytest
import torch
from emulated_gpu import NO_GPU, gpu, real_gpu  # noqa: F401 - a fixture
from worlds import assert_same

import moecomm
from bench import device, device_decode, device_run, device_torch, tune
from moecomm import reference, tuning

SHAPE = device.Shape(tokens=29, hidden=16, experts=32, top_k=4, groups=8, top_groups=4)


@pytest.mark.parametrize("nodes,per_node", [(1, 4), (2, 2), (4, 1)])
def test_world_equals_the_oracle(nodes, per_node):
    """The fast expectations of the benchmark equal those of the slow oracle."""
    size = nodes * per_node
    world = device.World(SHAPE, size, "cpu")
    xs, ids, weights = list(world.x), list(world.ids), list(world.weights)
    want = reference.dispatch(xs, ids, weights, num_experts=SHAPE.experts)
    scale = lambda rank: (rank + 1) / 4  # noqa: E731
    expected = reference.combine(
        [(w.x.float() * scale(r)).bfloat16() for r, w in enumerate(want)],
        want,
        [SHAPE.tokens] * size,
        ranks_per_node=per_node,
        topk_weights=[w.topk_weights for w in want],
    )
    crossings = 0
    for rank in range(size):
        assert world.counts[rank] == len(want[rank].x)
        assert_same(world.x.flatten(0, 1)[world.sources(rank)], want[rank].x, f"rank {rank}: x")
        assert_same(world.row_weights(rank), want[rank].topk_weights, f"rank {rank}: weights")
        assert_same(world.combined(rank, scale, nodes), expected[rank], f"rank {rank}: y")
        for t in range(SHAPE.tokens):
            crossings += len({int(e) // (SHAPE.experts // nodes) for e in ids[rank][t]} - {rank // per_node})
    assert world.nodes_per_token(nodes) == crossings
    picks, tokens = size * SHAPE.tokens * SHAPE.top_k, size * SHAPE.tokens
    assert device.must_move(world, nodes, "combine bf16") == 32 * (tokens + 2 * crossings + picks)


def test_what_torch_does_in_turns_is_the_same_work():
    """torch does the same work: its rows are the received rows, its sums equal those of combine except for rounding."""
    world = device.World(SHAPE, 4, "cpu")
    permuter = device_torch.Permuter(world)
    rows = permuter.dispatch()
    assert_same(rows, torch.cat([world.x.flatten(0, 1)[world.sources(rank)] for rank in range(4)]), "rows")
    rows *= world.owner[:, None] + 1
    expected = torch.cat([world.combined(rank, lambda owner: owner + 1, 1) for rank in range(4)])
    torch.testing.assert_close(permuter.combine().float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("nodes,per_node", [(1, 4), (2, 2)])
def test_decode_expectations_equal_the_oracle(nodes, per_node):
    size = nodes * per_node
    world = device.World(
        device.Shape(tokens=5, hidden=128, experts=32, top_k=4, groups=8, top_groups=4), size, "cpu"
    )
    xs, ids, weights = list(world.x), list(world.ids), list(world.weights)
    want = reference.decode_dispatch(xs, ids, num_experts=32, max_tokens=5)
    scale = lambda rank: (rank + 1) / 4  # noqa: E731
    sums = reference.decode_combine(
        [(w.x.float() * scale(r)).bfloat16() for r, w in enumerate(want)],
        ids,
        weights,
        num_experts=32,
        ranks_per_node=per_node,
    )
    messages = answers = 0
    for rank in range(size):
        for e in range(32 // size):
            tokens = device_decode.rows_of_expert(world, rank * (32 // size) + e)
            assert_same(
                world.x.flatten(0, 1)[tokens],
                want[rank].x[e, : want[rank].counts[e]],
                f"rank {rank}: rows of expert {e}",
            )
        assert_same(device_decode.expected_sums(world, rank, scale), sums[rank], f"rank {rank}: y")
        for t in range(5):
            owners = [int(e) // (32 // size) for e in ids[rank][t]]
            far = [r for r in owners if r // per_node != rank // per_node]
            messages, answers = messages + len(set(far)), answers + len(far)
    picks, tokens = size * 5 * 4, size * 5
    assert device_decode.must_move(world, nodes) == 256 * (2 * tokens + picks + 2 * answers) + (128 + 4) * (
        picks + 2 * messages
    )


def test_tuning_candidates_fit():
    hardware = tuning.HARDWARE["NVIDIA H200"]
    for nodes, per_node in device.GEOMETRIES:
        plans = tune.candidates(hardware, tune.traffic_of(device.Shape(), nodes, per_node), 16)
        assert len(plans) > 4 and len(set(plans)) == len(plans)
        for plan in plans:
            assert tuning.fits(hardware, plan.warps, plan.stage_bytes, plan.stages)
            assert (plan.senders == 0) == (nodes == 1) and plan.senders < plan.num_sms * plan.warps - 1


def test_override_is_undone():
    plan = tuning.Plan(2, 4, 7, 0, 1024)
    hardware, traffic = tuning.HARDWARE["NVIDIA H200"], tune.traffic_of(device.Shape(), 1, 8)
    with tuning.overriding(lambda *_: plan):
        assert tuning.plan_for(hardware, traffic, 20, table={}) == plan
    assert tuning.plan_for(hardware, traffic, 20, table={}) != plan


@pytest.mark.skipif(NO_GPU is None, reason="there is a GPU")
def test_refusals_say_why():
    for make in (
        lambda: moecomm.Communicator(device="cuda"),
        lambda: moecomm.run_local(lambda comm: None, 2, device="cuda"),
    ):
        with pytest.raises(
            moecomm.InvalidArgument,
            match=r"device is 'cuda', but (this build has no CUDA extension|torch .* finds no GPU)",
        ):
            make()
    with pytest.raises(moecomm.InvalidArgument, match="expected cpu or cuda"):
        moecomm.Communicator(device="meta")


def test_a_failed_section_leaves_the_others_rows(monkeypatch, tmp_path):
    """Sections are processes. A failed one keeps its rows so far, one that hangs is ended, and both are reported."""
    row = {
        "call": "dispatch bf16",
        "nodes": 1,
        "ranks_per_node": 8,
        "sms": 16,
        "us": 10.0,
        "gbs": 2000.0,
        "fraction": 0.5,
        "wrong": 0,
    }

    def section(command, cwd, timeout, check):
        name = command[command.index("--only") + 1]
        wrote = {
            "base": {"gpu": "a GPU", "torch": "2", "shape": vars(device.Shape()), "ceiling_gbs": 4000.0},
            "1x8": {"rows": [row]},
            "2x4": {"rows": [row]},
            "torch": {"torch_in_turns": {"combine": {"us": 10.0, "torch_us": 25.0, "ratio": 2.5}}},
        }
        if name in wrote:
            (tmp_path / f"device.{name}.json").write_text(json.dumps(wrote[name]))
        if name == "decode":
            raise subprocess.TimeoutExpired(command, timeout)
        assert name in ("check", "base") or command[command.index("--ceiling") + 1] == "4000.0"
        return SimpleNamespace(returncode=1 if name == "2x4" else 0)

    monkeypatch.setattr(device_run.subprocess, "run", section)
    args = SimpleNamespace(device="cuda:0", iterations=3, tokens=8, minutes=7.5, no_sanitizer=False)
    assert device_run.run_all(args, tmp_path) == 1
    report = json.loads((tmp_path / "device.json").read_text())
    assert report["rows"] == [row, row] and report["failures"] == {
        "2x4": "exit status 1",
        "decode": "not finished in 120 s",
    }
    said = (tmp_path / "device.md").read_text()
    assert (
        "Section 2x4: exit status 1." in said
        and "| dispatch bf16 | 1x8 | 16 | 10.0 | 2000 | 50% | 0 |" in said
        and "4000 GB/s" in said
    )
    assert "combine: 25 us against 10 us, 2.50 times as long" in said
    assert not list(tmp_path.glob("device.*x*.json"))
    args.minutes = 0
    assert device_run.run_all(args, tmp_path) == 1
    assert set(json.loads((tmp_path / "device.json").read_text())["failures"].values()) == {"no time left"}


@pytest.mark.parametrize("command", ["device", "tune"])
@pytest.mark.skipif(NO_GPU is None, reason="there is a GPU")
def test_benchmarks_say_why(command):
    run = subprocess.run(
        [sys.executable, "-m", "bench", command],
        capture_output=True,
        text=True,
        timeout=100,
        env=dict(os.environ),
        check=False,
    )
    assert run.returncode == 2 and "nothing to measure" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("nodes,per_node", [(1, 8), (2, 4), (4, 2)])
@pytest.mark.parametrize("call", device.CALLS)
def test_necessary_bytes_by_hand(nodes, per_node, call):
    """Row by row over the picks of every token: each read and each write counts once."""
    shape = device.Shape(tokens=3, hidden=256, experts=64, top_k=4, groups=8, top_groups=4)
    world = device.World(shape, nodes * per_node, "cpu")
    plain, coded = 2 * 256, 256 + 4 * 2
    moved = 0
    for rank in range(world.size):
        for ids in world.ids[rank].tolist():
            far = {e * nodes // 64 for e in ids} - {rank // per_node}
            row = coded if "fp8" in call else plain
            moved += (
                plain + len(far) * 2 * row + len(ids) * row
            )  # its own row; into and out of staging; the experts' rows
    assert device.must_move(world, nodes, call) == moved


def test_one_call_measures_everything_in_less_than_eight_minutes(tmp_path, monkeypatch):
    """One run has all geometries and numbers of multiprocessors, decode of 1 to 128 tokens, and the comparisons."""
    parser = ArgumentParser()
    device_run.arguments(parser)
    args = parser.parse_args(["--out", str(tmp_path)])
    assert args.minutes < 8 and set(device_run.SECTIONS) == {
        "check",
        "base",
        "1x8",
        "2x4",
        "4x2",
        "decode",
        "torch",
        "overlap",
        "sanitizer",
    }
    asked = []

    def measure(args, shape, nodes, per_node, sms, ceiling):
        asked.append((nodes, per_node, sms))
        return [
            {
                "call": call,
                "nodes": nodes,
                "ranks_per_node": per_node,
                "sms": sms,
                "us": 1.0,
                "gbs": 1.0,
                "fraction": 0.1,
                "wrong": 0,
            }
            for call in device.CALLS
        ]

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(device_run, "measure", measure)
    for section in ("1x8", "2x4", "4x2"):
        args.only = section
        assert device_run.run_section(args, tmp_path / section) == 0
        assert len(json.loads((tmp_path / section).read_text())["rows"]) == 15
    assert asked == [(n, p, s) for n, p in ((1, 8), (2, 4), (4, 2)) for s in (16, 24, 40, 64, 128)]
    assert device.CALLS == ("dispatch bf16", "dispatch fp8", "combine bf16")
    assert (
        device_decode.TOKENS == (1, 2, 4, 8, 16, 32, 64, 128)
        and device_decode.GEOMETRIES == device.GEOMETRIES
    )


# -- on a GPU, real or emulated ------------------------------------------------------------------------------


def test_small_worlds(gpu):  # noqa: F811
    assert device.check_small_worlds("cuda:0") == 32
    assert device_decode.check_small_worlds("cuda:0") == 8


@real_gpu
def test_graphs_replay():
    """Three captured calls, replayed 101 times with new inputs in place, equal the oracle at the end."""
    world = device.small_world(2, seed=5)

    def rank_main(comm):
        xs, ids, weights = world
        x, i, w = (t[comm.rank].to(comm.device) for t in (xs, ids, weights))
        buf = moecomm.Buffer(comm, hidden=512, num_experts=8, top_k=4, max_tokens=32, num_sms=2)
        call = lambda: [buf.dispatch(x, i, w, capacity=100) for _ in range(3)]  # noqa: E731
        call()  # one call before the capture
        graph, outs = device.captured(comm, call)
        for n in range(101):
            x.copy_((xs[comm.rank].float() * (n + 1)).bfloat16())
            graph.replay()
        torch.cuda.current_stream().synchronize()
        last = [(t.float() * 101).bfloat16() for t in xs]
        want = reference.dispatch(last, ids, weights, num_experts=8, capacity=100)[comm.rank]
        for out in outs:
            assert_same(out.x.cpu(), want.x, f"rank {comm.rank}: x")
        buf.close()

    moecomm.run_local(rank_main, 2, ranks_per_node=1, device="cuda:0")


def test_a_missing_rank_times_out(gpu):  # noqa: F811
    """The kernel ends at its own deadline, the CUDA context survives, and the error names the suspected rank."""

    def rank_main(comm):
        buf = moecomm.Buffer(comm, hidden=64, num_experts=4, top_k=2, max_tokens=4, num_sms=2)
        if comm.rank == 0:
            x = torch.randn((4, 64), device=comm.device).bfloat16()
            ids = torch.tensor([[0, 3]] * 4, device=comm.device)
            with pytest.raises(moecomm.PeerTimeout) as caught:
                buf.dispatch(x, ids)
            assert caught.value.peer == 1
            assert float(torch.ones(3, device=comm.device).sum()) == 3

    moecomm.run_local(rank_main, 2, ranks_per_node=2, device="cuda:0", timeout=3.0)
