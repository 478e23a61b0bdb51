"""All ways to make a program that imports deep_ep use moecomm."""

import os
import subprocess
import sys

from moecomm.__main__ import main as moecomm_main
from moecomm.integrations import deep_ep

CHECKS = """
import deep_ep, sys
from deep_ep import Buffer, Config, ElasticBuffer, EPHandle, EventHandle, EventOverlap, topk_idx_t
from deep_ep.utils import EventHandle as handle, EventOverlap as overlap
from deep_ep.hybrid_ep_buffer import HybridEPBuffer, indices_to_map
import moecomm.integrations.deep_ep as ours
assert deep_ep.Buffer is ours.Buffer and handle is EventHandle and overlap is EventOverlap
assert sys.modules["deep_ep"] is ours
print("imported")
"""


REAL = """
import sys, types
import moecomm.integrations.deep_ep as ours
sys.modules["deep_ep"] = types.ModuleType("deep_ep")
try:
    ours.install()
except ValueError as refused:
    print(refused)
ours.install(force=True)
ours.install()
"""


def run(program, first_path=None):
    """Return the output of the program."""
    paths = [p for p in (first_path, os.getcwd(), os.environ.get("PYTHONPATH")) if p]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths)),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_three_ways_in(capsys):
    """install(), install(force=True) after another deep_ep, and the folder of `python -m moecomm deep-ep-path`."""
    said = run(REAL + CHECKS)
    assert "deep_ep has been imported already" in said and "imported" in said.splitlines()
    assert moecomm_main(["deep-ep-path"]) == 0
    assert capsys.readouterr().out.strip() == deep_ep.path() and "imported" in run(CHECKS, deep_ep.path())
