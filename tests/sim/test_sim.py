"""The sim world: results equal the oracle, and counters equal those of the cpu world."""

import itertools
import json
import re
import time
from pathlib import Path

import pytest
import torch
from worlds import assert_received, assert_same, random_world, round_trip

import moecomm
from moecomm import reference, sim, trace
from moecomm.overlap import Trace

GEOMETRIES = [(1, 1), (2, 1), (1, 3), (3, 2), (2, 4)]  # nodes x ranks per node


def cluster_of(world, size, per_node, **more):
    xs, ids, _ = world
    return sim.Cluster(
        size,
        ranks_per_node=per_node,
        hidden=xs[0].shape[1],
        num_experts=4 * size,
        top_k=ids[0].shape[1],
        max_tokens=max(map(len, xs)),
        dtype=xs[0].dtype,
        num_sms=4,
        channels=2,
        **more,
    )


@pytest.mark.parametrize("nodes,per_node", GEOMETRIES)
@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("seed", [None, 5])
def test_equals_oracle(nodes, per_node, layout, seed):
    """With and without perturbation, received rows and combined sums equal the oracle."""
    size = nodes * per_node
    world = random_world(
        size, [3 + 5 * r % 11 for r in range(size)], 64, 4 * size, 4, seed=nodes * 10 + per_node
    )
    xs, ids, weights = world
    c = cluster_of(world, size, per_node, payload=True)
    c.reset(seed)
    want = reference.dispatch(xs, ids, weights, num_experts=4 * size, layout=layout)
    got = c.dispatch(xs, ids, weights, layout=layout)
    for rank in range(size):
        assert_received(got[rank], want[rank], rank)
    rows = [(w.x.float() * (r + 1) / 4).to(w.x.dtype) for r, w in enumerate(want)]
    row_weights = [w.topk_weights for w in want] if layout == "expert" else None
    expected = reference.combine(
        rows, want, [len(x) for x in xs], ranks_per_node=per_node, topk_weights=row_weights
    )
    ys = c.combine(rows, topk_weights=row_weights, num_tokens=[len(x) for x in xs])
    for rank in range(size):
        assert_same(ys[rank], expected[rank], f"rank {rank}: y")


@pytest.mark.parametrize("nodes,per_node", [(1, 3), (3, 2), (2, 4)])
@pytest.mark.parametrize("payload", [True, False])
def test_counts_equal_cpu_world(nodes, per_node, payload):
    """Rows and bytes per hop on the modeled links equal the protocol's and those of the cpu world."""
    size = nodes * per_node
    world = random_world(size, [3 + 5 * r % 11 for r in range(size)], 64, 4 * size, 4, seed=7)
    xs, ids, weights = world
    real = moecomm.run_local(
        lambda comm: round_trip(comm, world, num_experts=4 * size, top_k=4), size, ranks_per_node=per_node
    )
    c = cluster_of(world, size, per_node, payload=payload)
    p = c.program()
    p.dispatch(ids, weights, xs=xs if payload else None)
    p.combine()
    c.run(p)
    for rank in range(size):
        mine, crossed = c.stats()[rank], c.links()[rank]
        for hop in ("rail", "node"):
            assert mine[hop] == real[rank][hop], (
                f"rank {rank}, {hop}: {mine[hop]}, in the cpu world {real[rank][hop]}"
            )
            assert crossed[hop]["row_bytes"] == real[rank][hop]["physical_bytes"], (
                f"rank {rank}, {hop}: {crossed[hop]}"
            )
        assert crossed["node"]["rows"] == real[rank]["node"]["physical_rows"]
        assert mine["replicated_rows"] == real[rank]["replicated_rows"]


@pytest.mark.parametrize("nodes,per_node", GEOMETRIES)
@pytest.mark.parametrize("weights_travel", [False, True])
@pytest.mark.parametrize("seed", [None, 5])
def test_decode_equals_oracle(nodes, per_node, weights_travel, seed):
    """Several steps in sequence, with alternating epochs."""
    size = nodes * per_node
    c = sim.Cluster(
        size,
        ranks_per_node=per_node,
        hidden=64,
        num_experts=4 * size,
        top_k=4,
        max_tokens=8,
        num_sms=4,
        payload=True,
        decode=True,
    )
    c.reset(seed)
    for i in range(3):
        xs, ids, weights = random_world(
            size, [(3 + 5 * r + i) % 8 for r in range(size)], 64, 4 * size, 4, seed=i
        )
        want = reference.decode_dispatch(xs, ids, num_experts=4 * size, max_tokens=8)
        got = c.decode_dispatch(xs, ids, weights if weights_travel else None)
        for rank in range(size):
            assert_same(got[rank].counts, want[rank].counts, f"rank {rank}: counts")
            for e, n in enumerate(want[rank].counts.tolist()):
                assert_same(got[rank].x[e, :n], want[rank].x[e, :n], f"rank {rank}: x of expert {e}")
        rows = [(w.x.float() * (r + 1) / 4).to(w.x.dtype) for r, w in enumerate(want)]
        expected = reference.decode_combine(
            rows, ids, weights, num_experts=4 * size, weights_travel=weights_travel
        )
        ys = c.decode_combine(rows, None if weights_travel else weights, num_tokens=[len(x) for x in xs])
        for rank in range(size):
            assert_same(ys[rank], expected[rank], f"rank {rank}: y")


@pytest.mark.parametrize("payload", [True, False])
def test_decode_counts_equal_cpu_world(payload):
    """Like test_counts_equal_cpu_world, for decode."""
    size, per_node = 6, 2
    xs, ids, weights = random_world(size, 8, 64, 4 * size, 4, seed=3)

    def real_step(comm):
        buf = moecomm.Buffer(comm, hidden=64, num_experts=4 * size, top_k=4, max_tokens=8)
        recv, _ = buf.decode_dispatch(xs[comm.rank], ids[comm.rank], quant=None, return_hook=False)
        buf.decode_combine(
            recv.handle.rows, ids[comm.rank], weights[comm.rank], recv.handle, return_hook=False
        )
        return buf.stats()["decode"]

    real = moecomm.run_local(real_step, size, ranks_per_node=per_node)
    c = sim.Cluster(
        size,
        ranks_per_node=per_node,
        hidden=64,
        num_experts=4 * size,
        top_k=4,
        max_tokens=8,
        num_sms=4,
        payload=payload,
        decode=True,
    )
    p = c.program()
    p.decode_dispatch(ids, xs=xs if payload else None)
    p.decode_hook()
    p.decode_combine(weights)
    p.decode_hook()
    c.run(p)
    for rank in range(size):
        for hop in ("rail", "node"):
            assert c.stats()[rank][hop] == real[rank][hop], f"rank {rank}, {hop}"
        assert c.links()[rank]["rail"]["row_bytes"] == real[rank]["rail"]["physical_bytes"]


def test_examples_of_the_docs(tmp_path, monkeypatch):
    """docs/simulation.md: the calls return the reference's results, the fast path returns times."""
    text = (Path(__file__).parents[2] / "docs/simulation.md").read_text()
    monkeypatch.chdir(tmp_path)  # an example records
    said = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, said)
        if "zs" in said and "step" not in said:
            want = reference.dispatch(said["xs"], said["ids"], said["weights"], num_experts=16)
            for rank in range(4):
                assert_received(said["received"][rank], want[rank], rank)
            want = reference.decode_dispatch(said["xs"], said["ids"], num_experts=16, max_tokens=9)
            expected = reference.decode_combine(
                [w.x for w in want], said["ids"], said["weights"], num_experts=16
            )
            for rank in range(4):
                assert_same(said["zs"][rank], expected[rank], f"rank {rank}: y")
    assert (
        said["step"].dispatch_us.shape == (320,)
        and (said["step"].combine_us > said["step"].dispatch_us).all()
    )


def test_deterministic():
    """Two runs give equal times, with and without chaos."""
    ids = list(
        torch.rand((16, 32, 64), generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :4].contiguous()
    )
    c = sim.Cluster(16, ranks_per_node=4, hidden=256, num_experts=64, top_k=4, max_tokens=32, decode=True)
    first, second = c.step(ids), c.step(ids)
    assert (first.dispatch_us == second.dispatch_us).all() and (first.combine_us == second.combine_us).all()
    first, second = c.decode_step(ids), c.decode_step(ids)
    assert (first.dispatch_us == second.dispatch_us).all() and (first.combine_us == second.combine_us).all()


def test_links_are_shared_fairly():
    """Many senders to one receiver: its link is the bottleneck, and each sender gets its share."""
    size, tokens = 5, 64
    ids = [torch.zeros((0, 1), dtype=torch.int64)] + [
        torch.zeros((tokens, 1), dtype=torch.int64) for _ in range(size - 1)
    ]
    c = sim.Cluster(
        size, ranks_per_node=1, hidden=7168, num_experts=size, top_k=1, max_tokens=tokens, num_sms=8
    )
    step = c.step(ids, lead_ns=0.0)
    wire_us = (size - 1) * tokens * 7168 * 2 / 50e3
    assert wire_us < step.dispatch_us[0] < wire_us + 40, f"{step.dispatch_us} for {wire_us} us on the wire"
    busy = c.links()[0]["busy"]["rail_in"] / 1e6
    assert wire_us <= busy < wire_us * 1.05, f"{busy} us busy, {wire_us} us of rows"


def test_as_many_roles_as_gpus_have():
    """39,600 roles wait at once, as in a plan for all SMs of H100s.

    Their stacks share mappings, of which Linux allows a process 65,530.
    """

    def mappings():
        return Path("/proc/self/maps").read_text().count("\n")

    c = sim.Cluster(
        300, ranks_per_node=4, hidden=64, num_experts=300, top_k=2, max_tokens=132, num_sms=132, decode=True
    )
    ids = torch.rand((300, 132, 300), generator=torch.Generator().manual_seed(1)).topk(2).indices
    before = mappings()
    for lead_ns in (None, 0.0):
        step = c.decode_step(ids, lead_ns=lead_ns)
        assert (step.dispatch_us > 0).all() and (step.combine_us > 0).all()
        assert mappings() - before < 16_384, (
            "a mapping per stack, or a guard per stack: a larger world has none left"
        )


def test_lead_changes_little():
    """In a large world, roles that run ahead of the clock give the same times within a few percent."""
    ids = list(
        torch.rand((96, 112, 96), generator=torch.Generator().manual_seed(1))
        .argsort(-1)[..., :8]
        .contiguous()
    )
    c = sim.Cluster(
        96, ranks_per_node=8, hidden=7168, num_experts=96, top_k=8, max_tokens=112, num_sms=8, decode=True
    )
    for step in (c.step, c.decode_step):
        strict, ahead = step(ids, lead_ns=0.0), step(ids)
        assert abs(ahead.dispatch_us.mean() / strict.dispatch_us.mean() - 1) < 0.06, (
            strict.dispatch_us.mean(),
            ahead.dispatch_us.mean(),
        )
        assert abs(ahead.combine_us.mean() / strict.combine_us.mean() - 1) < 0.06, (
            strict.combine_us.mean(),
            ahead.combine_us.mean(),
        )


@pytest.mark.parametrize("decode", [False, True])
def test_timelines_have_the_same_roles(tmp_path, decode):
    """One track per role and rank in both worlds, with the same names; spans of a track nest or follow each other."""
    size, per_node = 4, 2
    world = random_world(size, 12, 64, 4 * size, 4, seed=2)
    xs, ids, _ = world
    c = cluster_of(world, size, per_node, decode=decode)
    with trace.recording(c):
        (c.decode_step if decode else c.step)(ids)
        simulated = trace.spans_of_cluster(c)

    def run(comm):
        buf = moecomm.Buffer(comm, hidden=64, num_experts=4 * size, top_k=4, max_tokens=12)
        x, own_ids = xs[comm.rank], ids[comm.rank]

        def call():
            if decode:
                received, hook = buf.decode_dispatch(x, own_ids)
                hook()
                buf.decode_combine(received.handle.rows, own_ids, None, received.handle, return_hook=False)
            else:
                out = buf.dispatch(x, own_ids)
                buf.combine(out.handle.rows, out.handle)

        with Trace(buf) as recorded:
            call()  # sets up the decode path
            call()
            began = time.perf_counter()
        spans = trace.spans_of_buffers(recorded, comm.rank)
        call()
        assert (
            trace.spans_of_buffers(recorded, comm.rank) == spans and max(s.end for s in spans) <= 1e6 * began
        ), "tracing has ended"
        return spans

    real = [s for spans in moecomm.run_local(run, size, ranks_per_node=per_node) for s in spans]
    assert {s.role for s in real} <= set(trace.ROLES) and ("decode pack" in {s.role for s in real}) == decode
    for rank in range(size):
        assert {s.role for s in simulated if s.rank == rank} == {s.role for s in real if s.rank == rank}
    for name, spans in (("sim", simulated), ("cpu", real)):
        path = tmp_path / f"{name}.json"
        trace.save(path, spans)
        events = json.loads(path.read_text())["traceEvents"]
        tracks = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
        assert len(tracks) == len({(s.rank, s.role, s.channel) for s in spans})
        slices = sorted(
            (e for e in events if e["ph"] == "X"), key=lambda e: (e["pid"], e["tid"], e["ts"], -e["dur"])
        )
        assert min(e["ts"] for e in slices) == 0 and all(e["dur"] >= 0 for e in slices)
        for a, b in itertools.pairwise(slices):
            if (a["pid"], a["tid"]) == (b["pid"], b["tid"]):
                inside, behind = (
                    b["ts"] + b["dur"] <= a["ts"] + a["dur"] + 1e-6,
                    b["ts"] >= a["ts"] + a["dur"] - 1e-6,
                )
                assert inside or behind, (a, b)
    waits = [s for s in simulated if s.name.startswith("wait for rank")]
    assert waits, "no role waited for another rank"


def spread(ranks, tokens, top_k, experts):
    """Compute picks by a fixed formula, int64 [ranks, tokens, top_k]."""
    rank, token, k = (
        torch.arange(ranks)[:, None, None],
        torch.arange(tokens)[None, :, None],
        torch.arange(top_k),
    )
    return (rank * 131 + token * token * 17 + k * 41) % experts


@pytest.mark.parametrize(
    "decode,lead_ns,sum_of_ends",
    [
        (True, 0.0, 17992648096),
        (True, sim.DECODE_LEAD_NS, 17973585856),
        (False, 0.0, 11889537848),
        (False, sim.LEAD_NS, 12359123568),
    ],
)
def test_predictions_stay_to_the_picosecond(decode, lead_ns, sum_of_ends):
    """An optimization of the simulator must not change its results.

    A change of the model or of the protocol may: then update these sums.
    """
    c = sim.Cluster(
        48, ranks_per_node=8, hidden=7168, num_experts=320 // 48 * 48, top_k=8, max_tokens=64, decode=decode
    )
    ids = spread(48, 64, 8, c.num_experts)
    c.reset(lead_ns=lead_ns)
    p = c.program()
    if decode:
        p.decode_dispatch(ids, quant="fp8")
        p.decode_hook()
        p.decode_combine()
        p.decode_hook()
    else:
        p.dispatch(ids, quant="fp8")
        p.combine()
    ends = round(1e6 * float(c.run(p)[:, :, 1].sum()))
    assert ends == sum_of_ends
