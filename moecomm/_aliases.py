"""Old module paths: `import moecomm.gate` imports moecomm.nn.gate, the same module object.

The old paths are public and stay valid. docs/design.md lists the packages.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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
    """Finds the old paths.

    It is first in sys.meta_path, because a leftover folder of an old path would be imported as a package.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of an alias; None for other names."""
        package, _, name = fullname.partition(".")
        if package != __package__ or name not in ALIASES:
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of the alias."""
        module = importlib.import_module(f"{__package__}.{ALIASES[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__, module.__loader__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import of the alias has replaced. The module has already run."""
        module.__spec__, module.__loader__ = module.__spec__.loader_state  # type: ignore[union-attr]


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
