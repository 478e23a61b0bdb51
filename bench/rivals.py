"""Baselines that need another MPI: Intel MPI, and oneCCL over it.

A process can use only one MPI, so they run in a separate environment (`make rivals`) under the launcher of Intel MPI.
moecomm is measured in the same run, from which their ratios are.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import subprocess
from pathlib import Path

from .launch import environment

NAMES = ("tuned-impi", "tuned-oneccl")
# Folder of the environment of `make rivals`.
HOME = Path(os.environ.get("MOECOMM_RIVALS", Path(__file__).resolve().parent.parent / ".venv-rivals"))
_LIBRARY = HOME / "lib" / "libmoecomm_oneccl.so"


def why_not():
    """Reason why these baselines cannot run, or None."""
    for path in (HOME / "bin" / "mpiexec.hydra", _LIBRARY):
        if not path.exists():
            return f"{path} does not exist; `make rivals` installs it"
    return None


def relaunch(ranks, words):
    """Run `python -m bench words` with this number of ranks under Intel MPI; return the exit status.

    Ranks share cores, so waits yield as those of moecomm do, and oneCCL works in the caller's thread.
    """
    variables = {
        "I_MPI_ROOT": str(HOME),
        "I_MPI_PIN": "0",
        "I_MPI_WAIT_MODE": "1",
        "CCL_ATL_TRANSPORT": "ofi",
        "CCL_WORKER_OFFLOAD": "0",
        "CCL_YIELD": "sched_yield",
        "CCL_LOG_LEVEL": "error",
        "LD_LIBRARY_PATH": str(HOME / "lib"),
    }
    command = [str(HOME / "bin" / "mpiexec.hydra"), "-n", str(ranks)]
    program = [str(HOME / "bin" / "python"), "-m", str(__package__)]
    return subprocess.call([*command, *program, *words], env=environment(**variables))


class OneCcl:
    """Sends rows with alltoallv of oneCCL."""

    name = "tuned-oneccl"
    _joined = None

    def __init__(self, world, row_bytes):
        self._row_bytes, self._counts = row_bytes, ctypes.c_size_t * world.size
        if OneCcl._joined is None:
            library = ctypes.CDLL(str(_LIBRARY))
            address = ctypes.create_string_buffer(4096)
            failed = library.oneccl_listen(address) if world.rank == 0 else 0
            failed, raw = world.allgather((failed, address.raw))[0]
            if failed or library.oneccl_join(world.size, world.rank, raw):
                raise RuntimeError("oneCCL could not connect the ranks")
            atexit.register(library.oneccl_leave)
            OneCcl._joined = library

    def exchange(self, send, send_counts, recv, recv_counts):
        """send [S, H] to recv [R, H]; counts are rows per rank."""
        failed = OneCcl._joined.oneccl_alltoallv(
            ctypes.c_void_p(send.data_ptr()),
            self._counts(*(n * self._row_bytes for n in send_counts)),
            ctypes.c_void_p(recv.data_ptr()),
            self._counts(*(n * self._row_bytes for n in recv_counts)),
        )
        if failed:
            raise RuntimeError("alltoallv of oneCCL failed")
