"""`python -m bench fabric` verifies its timed results, and writes its table."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moecomm import options

ROOT = Path(__file__).resolve().parents[2]


def test_a_small_run_is_right_and_complete(tmp_path):
    out = tmp_path / "rows.json"
    rest = ["--iters=1", "--sizes=8,4096", f"--json={out}"]
    run = subprocess.run(
        [sys.executable, "-m", "bench", "fabric", "--nodes=2", "--ranks-per-node=2", *rest],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = [(r["verb"], r["hop"], r["bytes"]) for r in rows]
    one_sided = [("ping", 8), *((verb, n) for verb in ("write", "read") for n in (8, 4096))]
    both = [(verb, "both", n) for verb in ("multicast", "reduce") for n in (8, 4096)]
    assert kinds == [(v, hop, n) for hop in ("node", "rail") for v, n in one_sided] + both
    assert all(r["seconds"] > 0 and r["ranks"] == 4 and r["nodes"] == 2 for r in rows)
    multicast = next(r for r in rows if r["verb"] == "multicast" and r["bytes"] == 4096)
    assert (multicast["rail_logical_bytes"], multicast["rail_physical_bytes"]) == (8192, 4096)
    assert multicast["node_physical_bytes"] == 8192 and multicast["mpi_seconds"] > 0


@pytest.mark.parametrize("text", ["", "7", "8,x", "0", "12"])
def test_bad_sizes_are_named(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"got .*expected (an int in 8|a multiple of 8)"):
        options.sizes(text)
