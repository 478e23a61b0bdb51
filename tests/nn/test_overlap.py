"""Two micro-batches through the same layers: results equal the sequential ones, and communication overlaps."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from worlds import assert_same

import moecomm
from moecomm.nn import MoE
from moecomm.overlap import Started, Trace, moe_stages, two_batches

HIDDEN, EXPERTS, TOP_K = 32, 8, 2
ROOT = Path(__file__).parents[2]


def make_layers(comm, count, dtype=torch.float32):
    buffer = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=16, dtype=dtype)
    torch.manual_seed(comm.rank)
    layers = [MoE(HIDDEN, 16, EXPERTS, TOP_K, 1, buffer) for _ in range(count)]
    attentions = [torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(count)]
    return buffer, layers, attentions


def plain(layers, attentions, x):
    for layer, attention in zip(layers, attentions, strict=True):
        x = x + attention(x)
        x = x + layer.shared_experts(x) + layer._routed(x, *layer.gate(x)[:2])
    return x


@pytest.mark.parametrize("size,per_node", [(2, 2), (4, 2)])
def test_two_batches_equal_one_after_the_other(size, per_node):
    def run(comm):
        _buffer, layers, attentions = make_layers(comm, 3)
        a, b = (torch.randn(t, HIDDEN) for t in (5 + comm.rank, 9 - 3 * comm.rank if comm.rank < 3 else 0))
        stages = [
            stage
            for layer, attention in zip(layers, attentions, strict=True)
            for stage in moe_stages(layer, attention)
        ]
        leaves = [[t.clone().requires_grad_() for t in (a, b)] for _ in range(2)]
        want = [plain(layers, attentions, t) for t in leaves[0]]
        got = two_batches(stages, *leaves[1])
        for g, w in zip(got, want, strict=True):
            assert_same(g.detach(), w.detach(), "y")
        (want[0].square().sum() + want[1].square().sum()).backward()
        (got[0].square().sum() + got[1].square().sum()).backward()
        for mine, theirs in zip(leaves[1], leaves[0], strict=True):
            # Sums in another order: the error is relative to the terms, not to a sum that nearly cancels.
            torch.testing.assert_close(
                mine.grad, theirs.grad, rtol=1e-4, atol=1e-6 * float(theirs.grad.norm())
            )

    moecomm.run_local(run, size, ranks_per_node=per_node)


def test_the_schedule_gives_way_when_a_batch_communicates():
    seen = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def wait(self):
            seen.append(f"wait {self.name}")
            return self.name[0]

    def compute(x):
        seen.append(f"compute {x}")
        return x

    def start(x):
        seen.append(f"start {x}")
        return Fake(x + " exchange")

    two_batches([compute, ("exchange", start), compute], "a", "b")
    assert seen == [
        "compute a",
        "start a",
        "compute b",
        "start b",
        "wait a exchange",
        "compute a",
        "wait b exchange",
        "compute b",
    ]
    seen.clear()
    assert two_batches([start], "a", "b") == ("a", "b") and seen == [
        "start a",
        "start b",
        "wait a exchange",
        "wait b exchange",
    ]
    assert two_batches([], 1, 2) == (1, 2)
    with pytest.raises(moecomm.InvalidArgument, match="layer_stages: experts is a int"):
        two_batches([("experts", 3)], 1, 2)


def test_communication_proceeds_while_python_computes():
    """No rank waits, all ranks compute, and the calls still complete."""

    def run(comm):
        buffer = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=16, dtype=torch.float32
        )
        x, ids = torch.randn(16, HIDDEN), torch.tensor([[0, 5]] * 16)
        pending = buffer.dispatch(x, ids, async_op=True)
        deadline, sums = time.monotonic() + 20, 0
        while not pending.done():
            sums += sum(range(1000))
            assert time.monotonic() < deadline, "the call did not proceed by itself"
        out = pending.wait()
        begin, end = pending.span
        assert begin < end <= time.perf_counter()
        assert buffer.combine(out.x, out.handle, async_op=True).wait().shape == x.shape
        with pytest.raises(moecomm.InvalidArgument, match="out of range"):
            buffer.dispatch(x, torch.full((16, TOP_K), EXPERTS), async_op=True).wait()

    moecomm.run_local(run, 2)


def test_traces_hold_stages_calls_and_roles(tmp_path):
    path = tmp_path / "trace.json"

    def run(comm):
        buffer, layers, attentions = make_layers(comm, 2)
        stages = [
            stage
            for layer, attention in zip(layers, attentions, strict=True)
            for stage in moe_stages(layer, attention)
        ]
        with torch.no_grad(), Trace(buffer) as trace:
            two_batches(stages, torch.randn(4, HIDDEN), torch.randn(4, HIDDEN), trace=trace)
        calls = [name for _, name, *_ in trace.spans("progress thread")]
        assert calls == ["a: dispatch", "b: dispatch", "a: combine", "b: combine"] * 2
        compute = [name for _, name, *_ in trace.spans("compute")]
        assert compute[:4] == ["a: attention", "a: dispatch", "b: attention", "b: dispatch"]
        roles = {name for _, name, *_ in trace.spans("roles")}
        assert roles == {
            "plan",
            "announce",
            "send",
            "counts",
            "forward",
            "arrive",
            "publish",
            "reduce",
            "sum",
            "done",
        }
        # Every role lies inside a call.
        spans = trace.spans("progress thread")
        for _, name, begin, end in trace.spans("roles"):
            assert any(b - 1e-3 <= begin <= end <= e + 1e-3 for _, _, b, e in spans), name
        buffer.dispatch(torch.zeros(1, HIDDEN), torch.tensor([[0, 1]]))
        assert buffer.backend.memory.native.take_timeline() == [], "tracing has ended"
        trace.save(path, comm)

    moecomm.run_local(run, 2, ranks_per_node=1)
    events = json.loads(path.read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1}
    spans = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 and e["ts"] > 0 for e in spans) and {e["cat"] for e in spans} == {
        "compute",
        "wait",
        "progress thread",
        "roles",
    }


def test_stages_appear_in_torch_profiler():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        two_batches([("attention", lambda x: x + 1)], torch.zeros(1), torch.zeros(1))
    assert {"moecomm compute a: attention", "moecomm compute b: attention"} <= {
        e.name for e in profile.events()
    }


def test_decode_overlaps_through_its_hooks():
    """Attention of one micro-batch overlaps the layer of the other; results equal plain decoding."""

    def run(comm):
        buffer = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=4, dtype=torch.float32
        )
        scale = 1.0 + torch.arange(EXPERTS) / 8
        mine = scale[comm.rank * buffer.experts_per_rank :][: buffer.experts_per_rank]
        generator = torch.Generator().manual_seed(comm.rank)
        ids = torch.rand(3, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].contiguous()
        weights = torch.rand(3, TOP_K, generator=generator)

        def attention(x):
            return x * 0.5 + 1

        def dispatch(x):
            received, hook = buffer.decode_dispatch(x, ids, quant=None, return_hook=True)
            return Started(hook, lambda _: received)

        def experts(received):
            for e, n in enumerate(received.counts.tolist()):
                torch.mul(received.x[e, :n], mine[e], out=received.handle.rows[e, :n])
            return received

        def combine(received):
            y, hook = buffer.decode_combine(
                received.handle.rows, ids, weights, received.handle, return_hook=True
            )
            return Started(hook, lambda _: y)

        layers = 5
        a, b = torch.randn(3, HIDDEN, generator=generator), torch.randn(3, HIDDEN, generator=generator)
        got = two_batches([attention, dispatch, experts, combine] * layers, a, b)
        factor = (weights * scale[ids]).sum(1, keepdim=True)
        for x, y in zip((a, b), got, strict=True):
            for _ in range(layers):
                x = attention(x) * factor
            torch.testing.assert_close(y, x)

    moecomm.run_local(run, 4, ranks_per_node=2)


@pytest.mark.parametrize("path", ["throughput", "decode"])
def test_the_benchmark_verifies_what_it_times(path, tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench",
        "overlap",
        "--path",
        path,
        "--tokens",
        "8",
        "--hidden",
        "64",
        "--intermediate",
        "32",
        "--iters",
        "2",
        "--warmup",
        "1",
        "--json",
        str(tmp_path / "out.json"),
        "--trace",
        str(tmp_path / "trace.json"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    record = json.loads((tmp_path / "out.json").read_text())
    assert (
        record["wrong"] == 0
        and record["path"] == path
        and record["overlapped_us"] > 0
        and record["communication_us"] > 0
    )
    names = {e["name"] for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert any(name.endswith(": experts") for name in names)
