"""Clients of deep_ep, run by the Python of an environment that has them."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_clients(python, worker, folder, **environment):
    """({"client ranks": largest difference}, all output) of one process, because importing takes longest."""
    done = subprocess.run(
        [python, "-W", "ignore", ROOT / "tests" / "support" / worker, folder],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **environment),
    )
    return dict(re.findall(r"^(\w+ \d) (\S+)$", done.stdout, re.M)), done.stdout[-2000:] + done.stderr[-6000:]


def assert_client(said, client, ranks, tolerance):
    """The client ran over these ranks, and its results differ by no more than that."""
    differences, output = said
    assert differences.get(f"{client} {ranks}", "None") != "None", output
    assert float(differences[f"{client} {ranks}"]) <= tolerance
