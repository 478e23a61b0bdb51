"""The parts of the benchmark: inputs, routes, the fast check against the oracle, output."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_records import a_record, small
from worlds import assert_same, random_world

from bench import cases, check, launch, report, routing, shaped_link
from bench.baselines import Routes
from moecomm import Buffer, InvalidArgument, options, reference, run_local

# -- inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "zipf", "text"])
def test_inputs_are_valid_and_repeatable(kind):
    case = small(routing=kind, groups=4, top_groups=2)
    for rank in range(case.ranks):
        one, two = (routing.make_inputs(case, rank, spare=3) for _ in range(2))
        assert one.x.shape == (12, 16) and one.ids.shape == one.weights.shape == (12, 4)
        assert (
            torch.equal(one.x, two.x)
            and torch.equal(one.ids, two.ids)
            and torch.equal(one.weights, two.weights)
        )
        assert ((one.ids >= 0) & (one.ids < 16)).all()
        assert (one.ids.sort(1).values.diff(dim=1) > 0).all(), "picks of a token are distinct"
        assert ((one.ids // 4).unsqueeze(2) == torch.arange(4)).any(1).sum(1).max() <= 2, (
            "a token stays within its groups"
        )
    assert not torch.equal(routing.make_inputs(case, 0).x, routing.make_inputs(case, 1).x)


def test_masked_and_unbalanced():
    case = small(masked=0.5, unbalanced=True, tokens=100)
    counts = [len(routing.make_inputs(case, r).x) for r in range(4)]
    assert counts == [25, 50, 75, 100]
    share = (routing.make_inputs(case, 3).ids < 0).float().mean()
    assert 0.35 < share < 0.65


def test_zipf_is_skewed():
    case = small(routing="zipf", tokens=400, top_k=1)
    load = torch.bincount(routing.make_inputs(case, 0).ids.flatten(), minlength=16).float()
    assert load.max() > 3 * load.median()


def test_routing_from_files(tmp_path):
    import numpy as np

    ids = np.arange(4 * 9 * 4).reshape(4, 9, 4) % 16
    np.save(tmp_path / "ids.npy", ids)
    case = small(routing=str(tmp_path / "ids.npy"))
    assert torch.equal(routing.make_inputs(case, 2).ids, torch.from_numpy(ids[2]))
    np.savez(tmp_path / "ids.npz", ids=ids.reshape(-1, 4), weights=np.full((36, 4), 0.5, np.float32))
    got = routing.make_inputs(small(routing=str(tmp_path / "ids.npz")), 1, spare=5)
    assert torch.equal(got.ids[:9], torch.from_numpy(ids.reshape(-1, 4)[1::4])) and (got.weights == 0.5).all()
    (tmp_path / "words.txt").write_text("one fish, two fish: red fish, blue fish. " * 9)
    got = routing.make_inputs(small(routing=str(tmp_path / "words.txt")), 1)
    assert got.ids.shape == (9, 4)
    with pytest.raises(InvalidArgument, match="expected"):
        routing.make_inputs(small(routing=str(tmp_path / "ids.npy"), top_k=3), 0)
    with pytest.raises(InvalidArgument, match=r"nowhere.txt"):
        routing.make_inputs(small(routing="nowhere.txt"), 0)


def test_words():
    assert routing.tokenize("def f(x): return 42") == ["def", "f", "(", "x", ")", ":", "return", "4", "2"]
    assert len(routing.text_files()) >= 8, "there is text on every machine that runs Python"


# -- the fast check is the oracle --------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fast_check_equals_the_oracle(layout, dtype):
    size, per_node, experts, top_k = 4, 2, 12, 5
    xs, ids, weights = random_world(size, [70, 0, 3, 9], 32, experts, top_k, dtype, seed=3)
    xs[0][0], xs[0][1] = -0.0, 1e-7  # signs of zero and small values must survive
    want = reference.dispatch(xs, ids, weights, num_experts=experts, layout=layout)
    rows = []
    for rank in range(size):
        source, token = check.received_order(ids, rank, num_experts=experts, layout=layout)
        assert_same(source, want[rank].source_rank, "source rank")
        assert_same(token, want[rank].source_token, "source token")
        rows.append(check.expert_output(want[rank].x, rank, torch.empty_like(want[rank].x)))
    row_weights = [w.topk_weights for w in want] if layout == "expert" else None
    for nodes_of in (per_node, size):  # forwarded per node, and direct
        expected = reference.combine(
            rows, want, [len(x) for x in xs], ranks_per_node=nodes_of, topk_weights=row_weights
        )
        for rank in range(size):
            group_of = [r // nodes_of for r in range(size)]
            rounded = [n != group_of[rank] for n in range(size // nodes_of)]
            got = check.combined(
                xs[rank],
                ids[rank],
                weights[rank],
                num_experts=experts,
                size=size,
                layout=layout,
                group_of=group_of,
                rounded=rounded,
            )
            assert_same(got, expected[rank], f"rank {rank}: y")


def test_count_wrong_counts_elements():
    table = torch.randn(6, 16).bfloat16()
    index = torch.tensor([3, 1, 1])
    got = table[index].clone()
    assert check.count_wrong(got, table, index) == 0
    got[1, 4] += 1
    got[2] = float("nan")
    assert check.count_wrong(got, table, index) == 17
    assert check.count_wrong(got[:2], table, index) > 0, "a missing row is wrong"
    nan = torch.full((1, 16), float("nan"))
    assert check.count_wrong(nan, nan) == 0, "bits, not values"
    assert check.count_wrong(torch.zeros(1, 16), -torch.zeros(1, 16)) == 16


# -- baselines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_routes_send_a_token_once_per_rank(layout):
    case = small(layout=layout)
    _, ids, weights = random_world(4, [9, 0, 4, 7], 16, 16, 4, seed=5)
    routes = [Routes(case, r, ids, weights) for r in range(4)]
    for source, sender in enumerate(routes):
        at = 0
        for to, receiver in enumerate(routes):
            wanted = [
                t
                for t in range(len(ids[source]))
                if any(e // 4 == to for e in ids[source][t].tolist() if e >= 0)
            ]
            assert sender.send_token[at : at + len(wanted)].tolist() == wanted
            assert sender.send_counts[to] == receiver.recv_counts[source] == len(wanted)
            assert sender.back[wanted, to].tolist() == list(range(at, at + len(wanted)))
            at += len(wanted)
        assert at == sender.sent and (sender.back >= 0).sum() == at


# -- what is written ---------------------------------------------------------------------------------


def test_latest_json_has_exactly_its_keys(tmp_path):
    records = [a_record(op=op) for op in ("dispatch", "combine", "roundtrip")]
    report.write_latest(tmp_path / "new" / "latest.json", records)
    latest = json.loads((tmp_path / "new" / "latest.json").read_text())
    assert set(latest) == {"machine", "versions", "cases"}
    for case in latest["cases"]:
        assert set(case) == {
            "op",
            "routing",
            "nodes",
            "ranks",
            "tokens",
            "hidden",
            "experts",
            "top_k",
            "time_us",
            "p99_us",
            "logical_bytes",
            "rail_bytes",
            "node_bytes",
            "wrong",
            "baselines",
            "ratios",
            "best_baseline",
            "floor_fraction",
            "in_cache",
            "cold",
            "kernel",
        }
        assert set(case["baselines"]) == {"tuned-mpi", "tuned-gloo", "torch-gloo"}
        assert case["time_us"] == 2000.0 and case["floor_fraction"] == 0.5 and case["ranks"] == 4


def test_lines_csv_table_and_chart(tmp_path):
    records = [a_record(op=op) for op in ("dispatch", "combine")]
    for _ in range(2):
        report.append(records, json_path=tmp_path / "r.jsonl", csv_path=tmp_path / "r.csv")
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[1])["op"] == "combine"
    table = (tmp_path / "r.csv").read_text().splitlines()
    assert len(table) == 5 and "baselines.tuned-mpi" in table[0]
    head = report.header(list(records[0]["baselines"])).splitlines()
    assert len({len(line) for line in [*head, report.row(records[0])]}) == 1, "columns line up"
    report.plot(tmp_path / "r.png", records)
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_families_are_the_ones_that_make_bench_promises():
    two, one = cases.FAMILIES
    assert (
        two.nodes,
        two.ranks_per_node,
        two.tokens,
        two.hidden,
        two.experts,
        two.top_k,
        two.groups,
        two.top_groups,
        two.routing,
    ) == (2, 4, 512, 7168, 256, 8, 8, 4, "text")
    assert (one.nodes, one.ranks_per_node, one.tokens, one.hidden, one.experts, one.top_k, one.routing) == (
        1,
        8,
        512,
        7168,
        64,
        8,
        "uniform",
    )
    assert (
        cases.baselines_of("gloo,mpi") == ["tuned-mpi", "tuned-gloo", "torch-gloo"]
        and cases.baselines_of("none") == []
    )
    with pytest.raises(argparse.ArgumentTypeError, match="nccl"):
        options.some_of(*cases.BASELINES)("nccl")


# -- whole commands, small ---------------------------------------------------------------------------


def bench(*words, timeout=100):
    """Run `python -m bench`; return its standard output."""
    root = Path(__file__).parents[2]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PMI_", "PRTE_"))}
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs_mpi():
    """mpi4py and an mpirun are optional."""
    pytest.importorskip("mpi4py")
    if shutil.which(launch.mpirun(1)[0]) is None:
        pytest.skip("no mpirun is installed")


def test_a_case_launches_itself_and_verifies_all(tmp_path):
    needs_mpi()
    text = bench(
        "roundtrip",
        "--nodes",
        "2",
        "--ranks-per-node",
        "2",
        "--tokens",
        "12",
        "--hidden",
        "64",
        "--experts",
        "16",
        "--top-k",
        "4",
        "--iters",
        "2",
        "--warmup",
        "1",
        "--masked",
        "0.3",
        "--unbalanced",
        "--layout",
        "expert",
        "--json",
        str(tmp_path / "r.jsonl"),
    )
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [r["op"] for r in records] == ["dispatch", "combine", "roundtrip"] and "roundtrip" in text
    for r in records:
        assert r["wrong"] == 0 and r["baselines_wrong"] == {"tuned-mpi": 0, "tuned-gloo": 0, "torch-gloo": 0}
        assert r["time_us"] > 0 and r["rail_bytes"] > 0 and r["node_bytes"] > 0 and r["floor_fraction"] > 0


def test_a_recording_feeds_a_case(tmp_path):
    """--routing with the folder of a recording uses its rows and bytes.

    If the number of ranks differs, the picks are distributed over the ranks.
    """
    needs_mpi()
    xs, ids, weights = random_world(4, 12, 64, 16, 4, seed=3)

    def main(comm):
        buf = Buffer(comm, hidden=64, num_experts=16, top_k=4, max_tokens=12, record=tmp_path / "trace")
        buf.dispatch(xs[comm.rank], ids[comm.rank], weights[comm.rank])
        comm.barrier()
        buf.close()

    run_local(main, 4, ranks_per_node=2)
    case = small(routing=str(tmp_path / "trace"))
    got = [routing.make_inputs(case, rank, spare=5) for rank in range(4)]
    for rank in range(4):  # 14 of 12 tokens: the last two repeat the first two
        assert torch.equal(got[rank].ids, ids[rank].repeat(2, 1)[:14]) and torch.equal(
            got[rank].weights, weights[rank].repeat(2, 1)[:14]
        )
    on_two = [routing.make_inputs(replace(case, ranks_per_node=1, tokens=24), rank).ids for rank in range(2)]
    assert torch.equal(torch.stack(on_two, 1).view(48, 4), torch.cat(ids))
    with pytest.raises(InvalidArgument, match="has top-4 of 16 experts; expected top-4 of 32"):
        routing.make_inputs(replace(case, experts=32), 0)

    text = bench(
        "roundtrip",
        "--nodes",
        "2",
        "--ranks-per-node",
        "2",
        "--tokens",
        "12",
        "--hidden",
        "64",
        "--experts",
        "16",
        "--top-k",
        "4",
        "--iters",
        "2",
        "--warmup",
        "1",
        "--baseline",
        "none",
        "--routing",
        str(tmp_path / "trace"),
        "--json",
        str(tmp_path / "r.jsonl"),
    )
    records = {r["op"]: r for r in map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())}
    assert (
        set(records) == {"dispatch", "combine", "roundtrip"}
        and all(r["wrong"] == 0 and r["routing"] == case.routing for r in records.values())
        and text
    )
    # An iteration rotates the 12 tokens and moves all of them.
    owners = [[set(t[t >= 0].tolist()) for t in i // 4] for i in ids]
    assert records["dispatch"]["logical_bytes"] == 128 * sum(len(o) for own in owners for o in own)
    assert records["dispatch"]["rail_bytes"] == 128 * sum(
        1 - rank // 2 in {o // 2 for o in token} for rank, own in enumerate(owners) for token in own
    )


def test_sim_small():
    text = bench("sim", "--ranks", "16", "--tokens", "4", "--steps", "3")
    assert "decode step   EP16, 4 tokens" in text and "of 3;" in text and "memory" in text


def test_shaped_link_small(tmp_path):
    reason = shaped_link.why_not()
    if reason:
        pytest.skip(f"namespaces with shaped links cannot be made here: {reason}")
    text = bench(
        "shaped-link",
        "--ranks-per-node",
        "1",
        "--tokens",
        "32",
        "--hidden",
        "2048",
        "--top-k",
        "2",
        "--iters",
        "1",
        "--warmup",
        "1",
        "--gbits",
        "1",
        "--plot",
        str(tmp_path / "link.png"),
    )
    row = text.splitlines()[4].split()
    assert float(row[0]) == 1 and int(row[-1]) == 0 and float(row[4]) > 0


@pytest.mark.parametrize(
    "started,options,nodes,per_node",
    [
        (0, "", 1, 8),
        (0, "--nodes 2 --ranks-per-node 4", 2, 4),
        (4, "", 1, 4),
        (4, "--nodes 2", 2, 2),
        (6, "--ranks-per-node 2", 3, 2),
        (4, "--nodes 2 --ranks-per-node 4", 2, 4),
    ],
)
def test_geometry_follows_the_launcher(monkeypatch, started, options, nodes, per_node):
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if started:
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", str(started))
    parser = argparse.ArgumentParser()
    cases.arguments(parser)
    case = cases.from_args(parser.parse_args(options.split()), "dispatch")
    assert (case.nodes, case.ranks_per_node) == (nodes, per_node)
