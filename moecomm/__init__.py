"""moecomm: Mixture-of-Experts token exchange: dispatch to the experts' ranks, combine the results.

The same protocol runs between threads, processes and hosts; see docs/protocol.md for one token's way.
"""

from __future__ import annotations

import ctypes as _ctypes
import os as _os

# UCX reads these when it is loaded: no signal handlers of its own, no chatter unless asked for.
for _name, _value in {"UCX_HANDLE_ERRORS": "none", "UCX_ERROR_SIGNALS": "", "UCX_LOG_LEVEL": "fatal"}.items():
    _os.environ.setdefault(_name, _value)

try:   # one UCX per process: where MPI was imported first and brought its own, that one serves (the calls are those of UCX 1.x)
    _ctypes.CDLL("libucp.so.0", mode=_os.RTLD_NOLOAD)
except OSError:
    import libucx as _libucx

    _libucx.load_library()   # so that the extension finds UCX wherever the wheel lies

from . import balance, gate, nn, ops, overlap, presets, quant, reference  # noqa: E402
from ._version import __version__  # noqa: E402
from .buffer import Buffer  # noqa: E402
from .communicator import Communicator  # noqa: E402
from .errors import (  # noqa: E402
    CapacityExceeded,
    ConfigMismatch,
    CorruptRow,
    InvalidArgument,
    MoecommError,
    PeerLost,
    PeerTimeout,
)
from .local import run_local  # noqa: E402
from .results import Dispatched, Handle, Pending  # noqa: E402

__all__ = [
    "Buffer", "CapacityExceeded", "Communicator", "ConfigMismatch", "CorruptRow", "Dispatched", "Handle", "InvalidArgument",
    "MoecommError", "PeerLost", "PeerTimeout", "Pending", "__version__", "balance", "gate", "nn", "ops", "overlap", "presets", "quant",
    "reference", "run_local",
]
