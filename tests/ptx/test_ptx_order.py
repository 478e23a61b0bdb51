"""Memory order of the compiled kernels: small worlds under the checker of tools/ptx, in random order."""

import os

import emulated_gpu
import ptx_worlds
import pytest
from ptx_machine import build

pytestmark = [
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
    pytest.mark.skipif(os.environ.get("EMULATED_KERNELS") != "ptx", reason="make ptx-check runs it"),
]


@pytest.mark.parametrize("name", list(ptx_worlds.WORLDS))
def test_everything_is_ordered(monkeypatch, name):
    gpu = emulated_gpu.install(monkeypatch, ptx_worlds.spread)
    for seed in (0, 1, 2):
        found = ptx_worlds.run(name, seed, gpu)
        assert found is None, found
