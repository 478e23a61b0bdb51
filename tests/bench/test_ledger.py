"""The ledger, its tables, and the comparison with a commit."""

import argparse
import subprocess
from types import SimpleNamespace

import pytest
from bench_records import a_record

from bench import compare, ledger, report
from moecomm import InvalidArgument


def results(tmp_path):
    """A latest.json with made-up numbers."""
    records = [a_record(op=op) for op in ("dispatch", "combine", "roundtrip")]
    for record in records:
        record["cold"] = {key: record[key] for key in report.COLD_KEYS}
    report.write_latest(tmp_path / "latest.json", records)
    return tmp_path / "latest.json"


def test_the_newest_entry_of_a_cpu_is_shown(tmp_path):
    latest, folder = results(tmp_path), tmp_path / "ledger"
    old = ledger.add(latest, folder, commit="a" * 40, date="2026-01-01")
    new = ledger.add(latest, folder, commit="b" * 40, date="2026-01-02")
    assert old != new and ledger.add(latest, folder, commit="b" * 40, date="2026-01-02") == new
    (entry,) = ledger.entries(folder)
    assert entry["commit"] == "b" * 40 and len(entry["cases"]) == 3
    table = ledger.table(entry)
    assert "| 2 x 2 | round trip | 2.0 | 50% | 50% | tuned-mpi | 1.00 x | 1.00 x | 1.00 x |" in table


def test_a_page_gets_its_tables(tmp_path):
    folder, page = tmp_path / "ledger", tmp_path / "page.md"
    ledger.add(results(tmp_path), folder, commit="c" * 40, date="2026-01-01")
    page.write_text(f"before\n{ledger.BEGIN}\nstale\n{ledger.END}\nafter\n")
    ledger.write(page, ledger.entries(folder))
    once = page.read_text()
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "stale" not in once
    ledger.write(page, ledger.entries(folder))
    assert page.read_text() == once


def test_the_documentation_quotes_the_ledger():
    text = ledger.PAGE.read_text()
    for entry in ledger.entries():
        assert ledger.table(entry) in text, "run `python -m bench ledger docs`"


def test_what_is_no_ledger_is_named(tmp_path):
    (tmp_path / "odd.json").write_text("{")
    with pytest.raises(InvalidArgument, match=r"odd\.json"):
        ledger.entries(tmp_path)


@pytest.mark.parametrize(
    "head, slower",
    [
        ([100, 101, 99, 100], False),
        ([110, 109, 111, 110], True),
        ([60, 109, 111, 190], False),  # noise
        ([102, 102, 102, 102], False),  # within the tolerance
    ],
)
def test_slower_is_more_than_noise(head, slower):
    assert compare.Row("1x8", "dispatch", [100] * 4, head).slower(0.03) is slower


def test_trees_take_turns(monkeypatch, tmp_path):
    order = []

    def run(tree, case, args):
        order.append(tree)
        return [{"op": "dispatch", "time_us": 2.0 if tree == compare.ROOT else 1.0}]

    monkeypatch.setattr(compare, "_run", run)
    rows = compare.measure(tmp_path, SimpleNamespace(rounds=4))
    firsts = order[::4]
    assert firsts == [compare.ROOT, tmp_path] * 2
    assert [(r.case, r.ratio, r.slower(0.03)) for r in rows] == [("2x4", 2.0, True), ("1x8", 2.0, True)]


def test_an_unknown_commit_is_named():
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=compare.ROOT, check=False).returncode:
        pytest.skip("this is no checkout")
    parser = argparse.ArgumentParser()
    compare.arguments(parser)
    with pytest.raises(InvalidArgument, match="nowhere"):
        compare.main(parser.parse_args(["nowhere"]))
