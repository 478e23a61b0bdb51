"""The decode benchmark: its fast check equals the oracle, and it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worlds import assert_same, random_world

from bench import check
from bench.cases import Case
from bench.decode import Routed, _sum
from moecomm import reference


@pytest.mark.parametrize("weights_travel", [False, True])
def test_sums_are_those_of_the_oracle(weights_travel):
    case = Case(nodes=1, ranks_per_node=4, hidden=32, experts=12, top_k=5)
    xs, ids, weights = random_world(4, 9, 32, 12, 5, seed=1)
    want = reference.decode_dispatch(xs, ids, num_experts=12, max_tokens=9)
    rows = [check.expert_output(w.x, r, torch.empty_like(w.x)) for r, w in enumerate(want)]
    expected = reference.decode_combine(rows, ids, weights, num_experts=12, weights_travel=weights_travel)
    for r in range(4):
        got = _sum(case, Routed(xs[r], ids, weights, None, None, None, None), r, weights_travel)
        assert_same(got, expected[r], f"rank {r}")


def test_it_runs_and_finds_nothing_wrong(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench",
        "decode",
        "--geometries",
        "1x2,2x1",
        "--tokens",
        "2",
        "--hidden",
        "64",
        "--experts",
        "8",
        "--top-k",
        "3",
        "--baseline",
        "mpi",
        "--blocks",
        "1",
        "--steps",
        "3",
        "--json",
        str(tmp_path / "out.jsonl"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["nodes"] for r in records] == [1, 2]
    for record in records:
        assert set(record["contenders"]) == {
            "decode",
            "hooks",
            "weighted",
            "floor",
            "throughput",
            "tuned-mpi",
        }
        assert all(c["wrong"] == 0 and c["median_us"] > 0 for c in record["contenders"].values())
        assert record["put_us"] > 0 and set(record["parts_us"]) == {
            "dispatch send",
            "dispatch receive",
            "combine send",
            "combine receive",
        }
    assert (
        records[0]["bytes"]["decode"]["rail"]["physical"]
        == 0
        < records[1]["bytes"]["decode"]["rail"]["physical"]
    )
