"""Loads the parts of an extension: separate modules that share one library and its C++ state."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location


def load_parts(library: str, package: str, names: list[str]) -> None:
    """Load modules of moecomm._native.`package` from a library. A part follows the parts that it imports.

    Parameters
    ----------
    library : str
        Path of the extension that has the parts.
    package : str
        Their package: shared, cpu_world, cuda_world or sim_world.
    names : list of str
        Their names in it.
    """
    parent = importlib.import_module(f"moecomm._native.{package}")
    for name in names:
        full = f"{parent.__name__}.{name}"
        spec = spec_from_file_location(full, library, loader=ExtensionFileLoader(full, library))
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[full] = (
            module  # may replace the module of another library, for example of the emulated GPU
        )
        spec.loader.exec_module(module)
        setattr(parent, name, module)
