"""NCCL in the cuda world: the library, its required version, and the construction of its communicator.

The library is the one that this process has loaded (usually that of torch), else that of NCCL's wheel. A second library
beside that of torch is never loaded. Features by version:

    2.29    windows with loads and stores between the ranks of a host or of an NVLink domain
    2.30    several ranks on one GPU, with NCCL_MULTI_RANK_GPU_ENABLE=1
    version of the headers of this build, or newer: the network between nodes (GIN)
"""

from __future__ import annotations

from typing import Any

import ctypes
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidArgument, MoecommError, PeerTimeout

WINDOWS = 22900  # version code of NCCL
SHARED_GPU = 23000


@dataclass(frozen=True)
class Library:
    """A libnccl: its path, its version code, and whether this process had loaded it before moecomm."""

    path: str
    version: int
    loaded: bool


def spelled(version: Any) -> str:
    """Return a version code as text: 2.32.3 for 23203."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def loaded_path(maps: Any = "/proc/self/maps") -> Any:
    """Return the path of the libnccl that this process has loaded, or None."""
    with open(maps) as lines:
        paths = (line.split(maxsplit=5)[5].strip() for line in lines if "libnccl.so" in line)
        return next(iter(paths), None)


def wheel_path() -> Any:
    """Return the path of the libnccl of NCCL's wheel (nvidia-nccl-cu13 or -cu12), or None."""
    found = (Path(folder) / "nvidia/nccl/lib/libnccl.so.2" for folder in sys.path)
    return next((str(path) for path in found if path.exists()), None)


def find() -> Any:
    """Return the Library to use, or None."""
    before = loaded_path()
    path = before or wheel_path()
    if path is None:
        return None
    version = ctypes.c_int()
    if ctypes.CDLL(path).ncclGetVersion(ctypes.byref(version)):
        return None
    return Library(path, version.value, before is not None)


def sharing(gpus: Any) -> Any:
    """Return the first ranks that share a GPU, or []. gpus: the GPU of every rank."""
    for gpu in gpus:
        ranks = [r for r, other in enumerate(gpus) if other == gpu]
        if len(ranks) > 1:
            return ranks
    return []


def refusal(
    library: Any, headers: Any, gpus: Any, several_hosts: bool, environment: Any = os.environ
) -> str | None:
    """Return why this library cannot connect these ranks, with the expected one, or None if it can.

    Parameters
    ----------
    library : Library or None
    headers : int
        Version code of the headers of this build; 0: none.
    gpus : sequence
        A unique name of every rank's GPU.
    several_hosts : bool
        Whether ranks are on several hosts.
    environment : mapping, optional
    """
    if headers == 0:
        return (
            "this build has no NCCL; expected its headers at build time (pip install nvidia-nccl-cu13, or set "
            "NCCL_HOME); build moecomm again"
        )
    if library is None:
        return "there is no libnccl; expected one that torch has loaded, or NCCL's wheel (pip install nvidia-nccl-cu13)"
    origin = "loaded already" if library.loaded else "of the wheel"
    have = f"NCCL {spelled(library.version)} ({library.path}, {origin})"
    if library.version < WINDOWS:
        return f"{have} has no windows for kernels; expected {spelled(WINDOWS)} or newer"
    ranks = sharing(gpus)
    if ranks and library.version < SHARED_GPU:
        return (
            f"ranks {ranks} share a GPU, but {have} allows one rank per GPU; expected a GPU for each rank, or NCCL "
            f"{spelled(SHARED_GPU)} or newer with NCCL_MULTI_RANK_GPU_ENABLE=1"
        )
    if ranks and environment.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        return (
            f"ranks {ranks} share a GPU, which {have} allows only with NCCL_MULTI_RANK_GPU_ENABLE=1; set it in the "
            "environment of all ranks, and NCCL_NVLS_ENABLE=0"
        )
    if several_hosts and library.version < headers:
        return (
            f"{have} is older than the headers with which the network kernels of this build were compiled; expected "
            f"{spelled(headers)} or newer, or a build with older headers"
        )
    return None


def bounded(call: Any, timeout: float, *, what: str, rank: int) -> Any:
    """Return call(), run in another thread with a deadline: NCCL waits for every rank without one.

    Raises
    ------
    PeerTimeout
        The call has not returned within the timeout. Its thread goes on.
    InvalidArgument, MoecommError
        NCCL has refused the call, or the call has failed.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # noqa: BLE001 - raised below
            outcome.append((None, error))

    thread = threading.Thread(target=run, name=f"moecomm-nccl-{what}", daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise PeerTimeout(
            f"NCCL on rank {rank}: {what} took more than {timeout} s; expected every rank to make the same call",
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


def join(
    native: Any,
    rank: int,
    geometry: Any,
    device: int | None,
    gpu: Any,
    several_hosts: bool,
    exchange: Any,
    timeout: float,
) -> Any:
    """Make the native PeerAccess over a new NCCL communicator of these ranks. Collective.

    Parameters
    ----------
    native : module
        The extension.
    rank, geometry, device, gpu
        This rank; (rank, size, ranks per node); the index of its GPU; a unique name of that GPU.
    several_hosts : bool
    exchange : callable
        Takes the value of this rank and returns the values of all ranks. It distributes rank 0's unique id.
    timeout : float

    Raises
    ------
    InvalidArgument
        NCCL cannot be used; the message has its version and the expected one.
    PeerTimeout
        A rank does not make the call within the timeout.
    """
    library = find()
    everyone = exchange((gpu, None if library is None else library.version))
    reason = refusal(library, native.nccl_headers(), [name for name, _ in everyone], several_hosts)
    versions = [version for _, version in everyone]
    if reason is None and len(set(versions)) > 1:
        names = ", ".join("none" if v is None else spelled(v) for v in versions)
        reason = f"the versions of NCCL by rank are {names}; expected one version"
    reasons = exchange(reason)
    for other, why in enumerate(reasons):
        if why is not None:
            raise InvalidArgument(
                f"Communicator: device is 'cuda', which needs NCCL between these ranks; on rank {other}, {why}",
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
            f"Communicator: NCCL on rank 0 could not make a unique id: {why}",
            op="Communicator",
            phase="connect",
            rank=rank,
            peer=0,
        )
    return bounded(
        lambda: native.PeerAccess.nccl(path, geometry, device, name),
        timeout,
        what="making its communicator",
        rank=rank,
    )
