"""vLLM and SGLang over moecomm's drop-in for deep_ep, unchanged: `make clients-heavy`, by hand."""

import pytest
from clients import ROOT, assert_client, run_clients

PYTHON = ROOT / ".venv-clients-heavy" / "bin" / "python"
CLIENTS = (
    "vllm_high_throughput",
    "vllm_low_latency",
    "vllm_v2_prefill",
    "sglang_normal",
    "sglang_low_latency",
)
# Rows travel in bfloat16: a few of its roundings, relative to the largest value of a token.
TOLERANCE = 3 * 2.0**-8

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="vLLM and SGLang are not installed: make clients-heavy"
)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Return what run_clients does."""
    folder = tmp_path_factory.mktemp("clients")
    return run_clients(PYTHON, "heavy_clients_worker.py", folder, CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("client", CLIENTS)
def test_client(said, client, ranks):
    """A layer through the client's dispatcher equals the sum over all picks in float64."""
    assert_client(said, client, ranks, TOLERANCE)
