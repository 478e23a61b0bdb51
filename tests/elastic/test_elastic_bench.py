"""`bench elastic` kills real processes and reports the right results."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_one_kill_of_a_small_world(tmp_path):
    shape = "--ranks 4 --ranks-per-node 2 --hidden 512 --tokens 8 --experts 32 --top-k 4 --routing uniform"
    command = [sys.executable, "-m", "bench", "elastic", *shape.split(), "--kills", "1", "--steps", "6"]
    command += [
        "--victims",
        "gateway,two ranks",
        "--json",
        str(tmp_path / "report.json"),
        "--plot",
        str(tmp_path / "p.png"),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [k["victim"] for k in report["kills"]] == ["gateway", "two ranks"]
    parts = ["detect_s", "agree_s", "reconnect_s", "first_step_s"]
    for k in report["kills"]:
        assert list(k) == ["victim", "moment", *parts, "wrong", "hung", "verdicts"]
        assert (k["wrong"], k["hung"], k["verdicts"]) == (0, 0, 1)
        assert min(k[p] for p in parts) >= 0 and sum(k[p] for p in parts) > 0
    (j,) = report["joins"]
    assert j["join_s"] > 0 and j["longest_meanwhile"] > 0 and (j["wrong"], j["hung"]) == (0, 0)
    summary = report["summary"]
    assert summary["kills"] == 2 and summary["worst_total_s"] > 0 and summary["median_join_s"] == j["join_s"]
    assert not any(summary[name] for name in summary if name.startswith("leaked") or name == "failed")
    assert (tmp_path / "p.png").stat().st_size > 1000
