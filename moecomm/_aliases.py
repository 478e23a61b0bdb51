"""Module paths of before: `import moecomm.gate` imports moecomm.nn.gate, the same module object.

They are public, so they stay. What lies in which package: docs/design.md.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys

ALIASES = {
    "bootstrap": "_bootstrap.bootstrap",
    "mesh": "_bootstrap.mesh",
    "sockets": "_bootstrap.sockets",
    "groups": "_bootstrap.groups",
    "launch": "_bootstrap.launch",
    "encoding": "_bootstrap.encoding",
    "clock": "_bootstrap.clock",
    "cuda": "_cuda.cuda",
    "cuda_decode": "_cuda.decode",
    "record_cuda": "_cuda.record",
    "nccl": "_cuda.nccl",
    "tuning": "_cuda.tuning",
    "exclusive": "_cuda.exclusive",
    "explore": "sim.explore",
    "mutations": "sim.mutations",
    "clusters": "sim.clusters",
    "calibrate": "sim.calibrate",
    "planner": "sim.planner",
    "planner.cli": "sim.planner.cli",
    "planner.predict": "sim.planner.predict",
    "planner.question": "sim.planner.question",
    "planner.report": "sim.planner.report",
    "planner.sweeps": "sim.planner.sweeps",
    "record": "tracing.record",
    "record_check": "tracing.check",
    "record_files": "tracing.files",
    "record_format": "tracing.format",
    "recorder": "tracing.recorder",
    "replay": "tracing.replay",
    "trace": "tracing.trace",
    "archives": "tracing.archives",
    "gate": "nn.gate",
    "grouped": "nn.grouped",
    "overlap": "nn.overlap",
    "reference": "testing.reference",
    "reference_quant": "testing.reference_quant",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the old paths. It is asked first: a folder that is left of an old path would be taken for a package."""

    def find_spec(self, fullname, path=None, target=None):
        """The spec of an alias; None for any other name."""
        package, _, name = fullname.partition(".")
        if package != __package__ or name not in ALIASES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec):
        """The module that the alias stands for."""
        module = importlib.import_module(f"{__package__}.{ALIASES[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__, module.__loader__
        return module

    def exec_module(self, module):
        """Nothing: it has run. Its own spec comes back, which the import of the alias has replaced."""
        module.__spec__, module.__loader__ = module.__spec__.loader_state


def install():
    """Make the old paths importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
