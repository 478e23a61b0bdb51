"""Clients of deep_ep over moecomm's drop-in, unchanged: results and all gradients equal those of a single process.

They have an environment of their own (`make clients`), so that they are not a dependency of all other tests.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
# Largest difference allowed: probabilities travel in float32.
CLIENTS = {"megatron_deepep": 5e-6, "megatron_hybridep": 5e-6, "megatron_layer": 1e-5, "torchtitan_v2": 2e-5}


pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="megatron-core and torchtitan are not installed: make clients"
)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """({(client, ranks): largest difference}, all that was told) of one process, whose imports take longer
    than all else.
    """
    done = subprocess.run(
        [
            PYTHON,
            "-W",
            "ignore",
            ROOT / "tests" / "support" / "clients_worker.py",
            tmp_path_factory.mktemp("clients"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
    )
    return dict(re.findall(r"^(\w+ \d) (\S+)$", done.stdout, re.M)), done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("client", CLIENTS)
def test_client(said, client, ranks):
    """What the client computes over ranks, forward and backward, beside one process (of Megatron's layer:
    its own dispatcher).
    """
    differences, all_of_it = said
    assert differences.get(f"{client} {ranks}", "None") != "None", all_of_it
    assert float(differences[f"{client} {ranks}"]) <= CLIENTS[client]
