"""Makes `import deep_ep` import this drop-in: by entries in sys.modules, or by a folder for PYTHONPATH."""

from __future__ import annotations

from typing import Any
import argparse

import importlib
import sys
from pathlib import Path

from .errors import refuse

_DROP_IN = "moecomm.integrations.deep_ep"
_MODULES = {
    "deep_ep": _DROP_IN,
    "deep_ep.utils": f"{_DROP_IN}.utils",
    "deep_ep.hybrid_ep_buffer": f"{_DROP_IN}.hybrid_ep_buffer",
    "deep_ep.buffer": f"{_DROP_IN}.buffer",
}
_PATH = Path(__file__).parent / "path"


def install(*, force: Any = False) -> None:
    """Make `import deep_ep` (also .utils, .buffer and .hybrid_ep_buffer) import this drop-in, in this process.

    May be called repeatedly.

    Parameters
    ----------
    force : bool
        Replace the real deep_ep, too, if it has been imported. Objects imported from it before are not changed.

    Raises
    ------
    InvalidArgument
        The real deep_ep has been imported, and force is False.
    """
    modules = {name: importlib.import_module(target) for name, target in _MODULES.items()}
    found = sys.modules.get("deep_ep")
    if found is not None and not getattr(found, "__moecomm__", False) and not force:
        refuse(
            "install",
            f"deep_ep has been imported already, from {getattr(found, '__file__', 'an unknown path')}; "
            "call install() before the first import of deep_ep, or install(force=True)",
        )
    for name in [name for name in sys.modules if name == "deep_ep" or name.startswith("deep_ep.")]:
        del sys.modules[name]
    sys.modules.update(modules)


def path() -> str:
    """Return the folder to put first in PYTHONPATH. It contains a package deep_ep that imports this drop-in."""
    return str(_PATH)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command: none."""


def main(args: argparse.Namespace) -> int:
    """Print path(); return the exit status."""
    print(path())
    return 0
