"""moecomm: Mixture-of-Experts token exchange: dispatch tokens to the ranks of their experts, combine the results.

The same protocol runs between threads, processes and hosts. docs/protocol.md follows one token through it.
"""

from __future__ import annotations

import importlib.util as _importlib_util
import os as _os
from importlib import import_module as _import_module

# UCX reads these when it is loaded: no signal handlers of its own, no chatter unless asked for.
for _name, _value in {"UCX_HANDLE_ERRORS": "none", "UCX_ERROR_SIGNALS": "", "UCX_LOG_LEVEL": "fatal"}.items():
    _os.environ.setdefault(_name, _value)

from ._native import core as _core  # noqa: E402

# The wheels libucx-cu12 and libucx-cu13 are both the package `libucx`. It is not imported: UCX is loaded when
# nodes are joined.
_ucx = _importlib_util.find_spec("libucx")
_core.set_ucx_folders(
    [_os.path.join(folder, "lib") for folder in (_ucx.submodule_search_locations or ())] if _ucx else []
)

from . import _aliases  # noqa: E402

_aliases.install()

from . import balance, nn, ops, presets, quant  # noqa: E402
from ._version import __version__  # noqa: E402
from .buffer import Buffer  # noqa: E402
from .communicator import Communicator  # noqa: E402
from .errors import (  # noqa: E402
    CapacityExceeded,
    ConfigMismatch,
    CorruptRow,
    Excluded,
    InvalidArgument,
    MoecommError,
    NoMajority,
    PeerLost,
    PeerTimeout,
    StepInterrupted,
)
from .local import run_local  # noqa: E402
from .nn import gate, overlap  # noqa: E402
from .opaque import Opaque  # noqa: E402
from .results import Dispatched, Handle, Pending, PendingDispatch  # noqa: E402
from .testing import reference  # noqa: E402

__all__ = [
    "Buffer",
    "CapacityExceeded",
    "Communicator",
    "ConfigMismatch",
    "CorruptRow",
    "Dispatched",
    "Excluded",
    "Handle",
    "InvalidArgument",
    "MoecommError",
    "NoMajority",
    "Opaque",
    "PeerLost",
    "PeerTimeout",
    "Pending",
    "PendingDispatch",
    "StepInterrupted",
    "__version__",
    "balance",
    "gate",
    "nn",
    "ops",
    "overlap",
    "presets",
    "quant",
    "reference",
    "run_local",
]


def __getattr__(name: str) -> object:
    """Import a module by its old path, if no import statement has done it yet."""
    if name in _aliases.ALIASES:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
