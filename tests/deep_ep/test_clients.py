"""Clients of deep_ep on moecomm's drop-in, unmodified: results and all gradients equal those of a single process.

They have a separate environment (`make clients`), so that the other tests do not depend on them.
"""

import json
import subprocess
import sys

import pytest
from clients import ROOT, assert_client, run_clients

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
# Largest allowed difference: probabilities are sent as float32.
CLIENTS = {"megatron_deepep": 5e-6, "megatron_hybridep": 5e-6, "megatron_layer": 1e-5, "torchtitan_v2": 2e-5}


pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="megatron-core and torchtitan are not installed: make clients"
)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Return what run_clients does."""
    return run_clients(PYTHON, "clients_worker.py", tmp_path_factory.mktemp("clients"))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("client", CLIENTS)
def test_client(said, client, ranks):
    """The client on several ranks, forward and backward, agrees with one process or with Megatron's own dispatcher."""
    assert_client(said, client, ranks, CLIENTS[client])


def test_the_benchmark_of_clients(tmp_path):
    """A small run: all dispatchers agree, and each row reports it."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "clients", "--ranks", "2", "--tokens", "16", "--hidden", "32",
         "--experts", "4", "--top-k", "2", "--iters", "1", "--json", str(tmp_path / "rows.jsonl")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert set(row["ms"]) == {"alltoall", "allgather", "flex"} and max(row["difference"].values()) <= 1e-5
