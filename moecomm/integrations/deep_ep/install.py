"""How `import deep_ep` finds this drop-in: modules put into sys.modules, or a folder for PYTHONPATH."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from .errors import refuse

_OURS = "moecomm.integrations.deep_ep"
_MODULES = {
    "deep_ep": _OURS,
    "deep_ep.utils": f"{_OURS}.utils",
    "deep_ep.hybrid_ep_buffer": f"{_OURS}.hybrid_ep_buffer",
    "deep_ep.buffer": f"{_OURS}.buffer",
}
_PATH = Path(__file__).parent / "path"


def install(*, force=False):
    """Let `import deep_ep`, deep_ep.utils, deep_ep.buffer and deep_ep.hybrid_ep_buffer give this library,
    in this process. May be called again.

    Parameters
    ----------
    force : bool
        Also where the real deep_ep was imported before; what was taken from it before stays its own.

    Raises
    ------
    InvalidArgument
        The real deep_ep is imported already and force is False.
    """
    ours = {name: importlib.import_module(target) for name, target in _MODULES.items()}
    found = sys.modules.get("deep_ep")
    if found is not None and not getattr(found, "__moecomm__", False) and not force:
        refuse(
            "install",
            f"deep_ep is imported already, from {getattr(found, '__file__', 'an unknown place')}; expected "
            f"install() before the first import "
            "of deep_ep, or install(force=True)",
        )
    for name in [name for name in sys.modules if name == "deep_ep" or name.startswith("deep_ep.")]:
        del sys.modules[name]
    sys.modules.update(ours)


def path():
    """The folder to put first in PYTHONPATH, as text: it holds a package deep_ep that is this library."""
    return str(_PATH)


def arguments(parser):
    """None."""


def main(args):
    """Print path(); returns the exit status."""
    print(path())
    return 0
