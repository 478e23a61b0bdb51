"""Old module paths import the same modules as the new ones."""

import importlib
import subprocess
import sys

import pytest

import moecomm
from moecomm import _aliases


@pytest.mark.parametrize("path", _aliases.ALIASES)
def test_an_old_path(path):
    new = importlib.import_module(f"moecomm.{_aliases.ALIASES[path]}")
    assert importlib.import_module(f"moecomm.{path}") is new
    assert new.__name__ == new.__spec__.name == f"moecomm.{_aliases.ALIASES[path]}"
    if "." not in path:
        assert getattr(moecomm, path) is new


def test_in_a_fresh_process():
    """In any order, with every form of import."""
    code = (
        "from moecomm.reference import dispatch\n"
        "import moecomm.planner.cli\n"
        "from moecomm import gate, replay\n"
        "import moecomm.nn.gate\n"
        "assert moecomm.nn.gate is gate and dispatch is moecomm.testing.reference.dispatch\n"
        "assert moecomm.planner.cli is moecomm.sim.planner.cli\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_what_does_not_exist_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("moecomm.no_such_module")
