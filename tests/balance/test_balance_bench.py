"""The parts of the balance benchmark, and the example as run by a user."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import balance, balance_baseline, balance_recorded
from moecomm._native.balance import Replicas

ROOT = Path(__file__).parents[2]


def test_loads_are_what_they_say():
    capped = balance_baseline.zipf(0, 1 / 8)
    share = capped / capped.sum(1, keepdims=True)
    assert balance_baseline.zipf(0).max() / balance_baseline.zipf(0)[0].sum() > 1 / 8 >= share.max() - 1e-9, (
        "no expert can have more than 1/top_k"
    )
    assert balance_baseline.drift(capped, 0, 1 / 8).shape == capped.shape
    assert np.isclose(np.log(balance_baseline.lognormal(0.5, 3)).std(), 0.5, atol=0.01)


@pytest.mark.parametrize("groups,nodes", [(1, 1), (8, 4)])
def test_the_plain_greedy_is_a_placement(groups, nodes):
    load = balance_baseline.lognormal(1, 0)[:3]
    table = balance_baseline.plain_greedy(load, 288, groups, nodes, 32)
    for row in table:
        assert set(row) == set(range(256))
        if groups > 1:
            assert all(len({int(i) // 72 for i in np.nonzero(row // 32 == g)[0]}) == 1 for g in range(groups))
    assert 0.9 < balance_baseline.balancedness(load, table, 32) < 1


def test_integer_program_against_all_counts():
    load, ranks = np.random.default_rng(4).lognormal(0, 0.7, 5), 4
    best = min(
        max(p + q for p, q in zip(pieces, pieces[::-1]))
        for counts in itertools.product(range(1, ranks + 1), repeat=5)
        if sum(counts) == 2 * ranks
        for pieces in [sorted(load[e] / c for e, c in enumerate(counts) for _ in range(c))]
    )
    assert balance_baseline.best_pairs(load, ranks) == pytest.approx(load.sum() / ranks / best, rel=1e-3)


def test_linear_program_of_a_split():
    replicas = Replicas(np.array([0, 1, 0, 2], dtype=np.int32), 3, 2, 1)  # expert 0 is on both ranks
    assert balance_baseline.best_split(np.array([4.0, 1.0, 3.0]), replicas) == pytest.approx(4.0)
    assert balance_baseline.best_split(np.array([4.0, 9.0, 1.0]), replicas) == pytest.approx(9.0)


def test_rows_say_whether_targets_are_reached():
    assert "reached" in balance.Row("A", "x", 0.9, target=0.9, ms=1.0, target_ms=2.0).text()
    assert "missed" in balance.Row("A", "x", 0.9, target=0.9, ms=3.0, target_ms=2.0).text()
    assert "missed" in balance.Row("A", "x", 0.8, target=0.9).text()
    assert "missed: moves" in balance.Row("A", "x", 0.9, target=0.9, moves=2.0, target_moves=1).text()
    verdict = balance.Row("A", "x", 0.8).text()
    assert "reached" not in verdict and "missed" not in verdict


def test_recorded_loads_are_of_text_that_follows(monkeypatch):
    """A small run: the model learns, all picks of its gates are counted, and two pieces of text differ."""
    for name, value in dict(STEPS=80, TOKENS=256, READINGS=2, WINDOW=4).items():
        monkeypatch.setattr(balance_recorded, name, value)
    loads, before, after = balance_recorded.readings.__wrapped__()
    assert after < before - 0.4
    for load in loads:
        assert (
            load.shape == (balance_recorded.LAYERS, 256)
            and (load.sum(1) == 4 * 256 * 8).all()
            and (load <= 4 * 256).all()
        )
    assert not np.array_equal(*loads)
    monkeypatch.setattr(balance_recorded, "STEPS", 3)
    first, second = (balance_recorded.readings.__wrapped__()[0] for _ in range(2))
    assert np.array_equal(first, second), "equal runs give equal loads"


def test_command_writes_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        "-m",
        "bench",
        "balance",
        "--cases",
        "D",
        "--loads",
        "drift",
        "--seeds",
        "1",
        "--repeats",
        "1",
        "--json",
        str(out),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        check=False,
    )
    assert done.returncode == 0 and "of the ranks change" in done.stdout and "# 1 of 1 rows" in done.stdout, (
        done.stderr
    )
    assert out.read_text().count("\n") == 1
    assert (
        subprocess.run(
            [*command[:5], "X"],
            capture_output=True,
            cwd=ROOT,
            timeout=60,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            check=False,
        ).returncode
        != 0
    )


def test_example_rebalances_while_it_runs(tmp_path):
    picture = tmp_path / "loads.png"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "redundant_experts.py"), str(picture)],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "worth it" in done.stdout and "all results are correct" in done.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
