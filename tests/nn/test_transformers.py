"""moecomm inside Hugging Face transformers: a DeepseekV3 over ranks equals the one in a single process; equal routers.

transformers has an environment of its own (`make transformers`), so that it is not a dependency of all other tests.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = ROOT / ".venv-transformers" / "bin" / "python"
PYTHON = sys.executable if find_spec("transformers") else str(OWN) if OWN.exists() else None
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="transformers >= 5.23 is not installed: make transformers"
)


def run(*command):
    """What the worker prints on its last line."""
    done = subprocess.run(
        [PYTHON, *command],
        capture_output=True,
        text=True,
        timeout=180,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the model and what a single process computes; and the line about routers."""
    folder = tmp_path_factory.mktemp("deepseek")
    return folder, run(str(ROOT / "tests" / "support" / "transformers_worker.py"), "single", str(folder))


def test_gate_equals_the_router(model):
    """The same experts and weights as DeepseekV3TopkRouter with the same parameters."""
    assert float(re.fullmatch(r"router (\S+)", model[1])[1]) <= 1e-6


@pytest.mark.parametrize("ranks,arrangement", [(2, "shared"), (4, "split")])
def test_model_over_ranks_equals_a_single_process(model, ranks, arrangement):
    """Logits within 1e-6 in float32, gradients of all parameters; ranks that share a batch, and ranks with
    batches of their own.
    """
    said = run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(ROOT / "tests" / "support" / "transformers_worker.py"),
        arrangement,
        str(model[0]),
    )
    logits, grads, scale = map(float, re.fullmatch(r"logits (\S+) grads (\S+) of (\S+)", said).groups())
    assert logits <= 1e-6 and grads <= 1e-6 < scale, said
