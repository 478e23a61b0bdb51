"""NCCL in the cuda world: which library serves, what it must be able to do, and how its world is joined.

The library is the one that this process has loaded (torch's, as a rule), else that of NCCL's wheel; a second one beside
torch's is never loaded. Its version decides what is possible:

    2.29    windows that ranks of a host, or of an NVLink domain, load and store
    2.30    several ranks on one GPU, with NCCL_MULTI_RANK_GPU_ENABLE=1
    that of this build's headers, or newer: the network between nodes (GIN)
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidArgument, MoecommError, PeerTimeout

WINDOWS = 22900  # version codes, as NCCL counts
SHARED_GPU = 23000


@dataclass(frozen=True)
class Library:
    """A libnccl: its path, its version code, and whether this process had loaded it before it was looked for."""

    path: str
    version: int
    loaded: bool


def spelled(version):
    """A version code in words: 23203 is 2.32.3."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def loaded_path(maps="/proc/self/maps"):
    """The libnccl that is mapped into this process, or None."""
    with open(maps) as lines:
        paths = (line.split(maxsplit=5)[5].strip() for line in lines if "libnccl.so" in line)
        return next(iter(paths), None)


def wheel_path():
    """The libnccl of NCCL's wheel (nvidia-nccl-cu13, -cu12), or None."""
    found = (Path(folder) / "nvidia/nccl/lib/libnccl.so.2" for folder in sys.path)
    return next((str(path) for path in found if path.exists()), None)


def find():
    """The Library to use, or None."""
    before = loaded_path()
    path = before or wheel_path()
    if path is None:
        return None
    version = ctypes.c_int()
    if ctypes.CDLL(path).ncclGetVersion(ctypes.byref(version)):
        return None
    return Library(path, version.value, before is not None)


def sharing(gpus):
    """The first ranks that share a GPU, given every rank's GPU; none where each has its own."""
    for gpu in gpus:
        ranks = [r for r, other in enumerate(gpus) if other == gpu]
        if len(ranks) > 1:
            return ranks
    return []


def refusal(library, headers, gpus, several_hosts, environment=os.environ):
    """Why this library cannot carry such a world, with what is expected instead; None where it can.

    Parameters
    ----------
    library : Library or None
    headers : int
        Version code of the headers in this build, 0: none.
    gpus : sequence
        Every rank's GPU, by any name that is its own.
    several_hosts : bool
        Whether nodes are joined by a network.
    environment : mapping, optional
    """
    if headers == 0:
        return "this build has no NCCL: expected its headers (pip install nvidia-nccl-cu13, or NCCL_HOME) when moecomm is built"
    if library is None:
        return "there is no libnccl: expected one that torch has loaded, or NCCL's wheel (pip install nvidia-nccl-cu13)"
    have = f"NCCL {spelled(library.version)} ({library.path}, {'loaded already' if library.loaded else 'of the wheel'})"
    if library.version < WINDOWS:
        return f"{have} has no windows that kernels reach; expected {spelled(WINDOWS)} or newer"
    ranks = sharing(gpus)
    if ranks and library.version < SHARED_GPU:
        return (
            f"ranks {ranks} share a GPU, and {have} takes one rank per GPU; expected a GPU for each, or NCCL {spelled(SHARED_GPU)} or newer "
            "with NCCL_MULTI_RANK_GPU_ENABLE=1"
        )
    if ranks and environment.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        return (
            f"ranks {ranks} share a GPU; expected NCCL_MULTI_RANK_GPU_ENABLE=1 in the environment of all ranks (and NCCL_NVLS_ENABLE=0), "
            f"with which {have} allows it"
        )
    if several_hosts and library.version < headers:
        return (
            f"{have} is older than the headers that this build's network kernels were compiled with; expected {spelled(headers)} or newer, "
            "or a build with the older headers"
        )
    return None


def bounded(call, timeout, *, what, rank):
    """call()'s result, on a thread of its own: NCCL waits for every rank without a deadline.

    Raises
    ------
    PeerTimeout
        It has not returned in time; it is left alone.
    InvalidArgument, MoecommError
        What NCCL refuses, what fails.
    """
    outcome = []

    def run():
        try:
            outcome.append((call(), None))
        except BaseException as error:  # noqa: BLE001 - raised below
            outcome.append((None, error))

    thread = threading.Thread(target=run, name=f"moecomm-nccl-{what}", daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise PeerTimeout(
            f"NCCL on rank {rank}: {what} took more than {timeout} s: not every rank has come",
            op="Communicator",
            phase="connect",
            rank=rank,
        )
    result, error = outcome[0]
    if isinstance(error, ValueError):
        raise InvalidArgument(f"{what}: {error}", op="Communicator", rank=rank) from error
    if isinstance(error, RuntimeError):
        raise MoecommError(
            f"{what} on rank {rank}: {error}", op="Communicator", phase="connect", rank=rank
        ) from error
    if error is not None:
        raise error
    return result


def join(native, rank, geometry, device, gpu, several_hosts, exchange, timeout):
    """The extension's Reach over a new NCCL world of these ranks. Collective.

    Parameters
    ----------
    native : module
        The extension.
    rank, geometry, device, gpu
        This rank, (rank, size, ranks per node), the index of its GPU and that GPU's own name.
    several_hosts : bool
    exchange : callable
        Everybody's values by rank, given one's own: how rank 0's unique id comes to all.
    timeout : float

    Raises
    ------
    InvalidArgument
        The library that is here cannot do it, with its version and what is expected.
    PeerTimeout
        A rank does not come.
    """
    library = find()
    everyone = exchange((gpu, None if library is None else library.version))
    reason = refusal(library, native.nccl_headers(), [name for name, _ in everyone], several_hosts)
    versions = [version for _, version in everyone]
    if reason is None and len(set(versions)) > 1:
        reason = f"ranks have NCCL {', '.join('none' if v is None else spelled(v) for v in versions)}; expected one version"
    reasons = exchange(reason)
    for other, why in enumerate(reasons):
        if why is not None:
            raise InvalidArgument(
                f"Communicator: device is 'cuda' over NCCL; on rank {other} {why}",
                op="Communicator",
                rank=rank,
                peer=other,
            )
    path = library.path.encode()
    name = why = None
    if rank == 0:
        try:
            name = native.nccl_unique_id(path)
        except (RuntimeError, ValueError) as error:
            why = str(error)
    [name, why] = exchange((name, why))[0]
    if why is not None:
        raise MoecommError(
            f"Communicator: NCCL on rank 0 makes no world: {why}",
            op="Communicator",
            phase="connect",
            rank=rank,
            peer=0,
        )
    return bounded(
        lambda: native.Reach.nccl(path, geometry, device, name), timeout, what="joining the world", rank=rank
    )
