"""The cuda world: whether it is available, windows on GPUs, and stream semantics.

Buffers of a communicator with device="cuda" behave as in the cpu world, with these differences. Tensors are on the GPU.
Calls are kernels on the current stream. With a `capacity`, no call waits for the host, so calls can be captured in CUDA
graphs, after each was called once. A failure of such a call is raised by a later call.

A block of the arena is free when the last tensor that views it is dropped: use these tensors on the stream of the
buffer's calls, or synchronize before dropping them. Memory of a captured call is kept (see Buffer.release_captured).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import contextlib
import importlib
import importlib.util
import json
import math
import os
import socket
import weakref
from pathlib import Path

import torch

from . import nccl, streams, tuning
from .pieces import Piece
from .._native import core
from ..env import Environment
from ..errors import InvalidArgument


def built() -> Any:
    """Return the notes of setup.py: no_cuda and no_nccl are the reasons why a part is not in this build, or None."""
    note = Path(core.__file__).parent / "built.json"
    return json.loads(note.read_text()) if note.exists() else {}


def why_not() -> str | None:
    """Return the reason why the cuda world cannot be used here, or None."""
    if importlib.util.find_spec("moecomm._native.cuda") is None:
        reason = built().get("no_cuda") or "it was left out"
        return f"this build has no CUDA extension ({reason}); set CUDA_HOME and build moecomm again"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    return None


def require(op: str) -> None:
    """Refuse device="cuda" if the cuda world cannot be used here.

    Raises
    ------
    InvalidArgument
        The cuda world cannot be used; the message has the reason.
    """
    reason = why_not()
    if reason is not None:
        raise InvalidArgument(
            f"{op}: device is 'cuda', but {reason}; expected a usable GPU (python -m moecomm info shows the state), or "
            "device='cpu'",
            op=op,
        )


def native() -> Any:
    """Return the extension module. It is loaded at its first use, because it needs a driver."""
    return importlib.import_module("moecomm._native.cuda")


def prepare_threads() -> None:
    """Give each stream a hardware queue of its own, so that kernels of rank threads on one GPU run concurrently.

    This has an effect only before the process uses the GPU for the first time.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def spread_over_gpus(device: torch.device, rank: int) -> Any:
    """Return the GPU of a rank thread: the given one, else rank modulo the number of GPUs."""
    require("run_local")
    device = torch.device(device)
    return device if device.index is not None else torch.device("cuda", rank % torch.cuda.device_count())


def refuse_capture(op: str, comm: Any, name: str, why: str) -> None:
    """Refuse a feature that cannot be part of a CUDA graph while one is captured.

    Raises
    ------
    InvalidArgument
    """
    if torch.cuda.is_current_stream_capturing():
        raise InvalidArgument(
            f"{op}: a CUDA graph is captured, but the buffer has {name}, and {why}, which a replay does not do; "
            f"expected a buffer without {name}, or a call outside the capture",
            op=op,
            rank=comm.rank,
        )


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[Any]:
    """Context of a rank thread with a stream of its own.

    On the default stream, kernels of several ranks would run one after the other, although they wait for each other.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield stream
        stream.synchronize()


def fabric_of(threads: Any, hosts: Sequence[Any], ipc: Any, wanted: Any = "auto") -> str:
    """Return how ranks access each other's windows on GPUs: "threads", "ipc" or "nccl".

    Parameters
    ----------
    threads : bool
        Whether the ranks are threads of one process.
    hosts : sequence
        The host of every rank.
    ipc : sequence of bool
        By rank: whether CUDA IPC works with all other ranks of its host. Otherwise NCCL shares memory by VMM handles.
    wanted : str
        MOECOMM_CUDA_FABRIC.

    Raises
    ------
    InvalidArgument
        wanted is unknown, or impossible for these ranks.
    """
    if wanted not in ("auto", "ipc", "nccl"):
        raise InvalidArgument(
            f"MOECOMM_CUDA_FABRIC is {wanted!r}; expected auto, ipc or nccl", op="Communicator"
        )
    if threads:
        if wanted != "auto":
            raise InvalidArgument(
                f"MOECOMM_CUDA_FABRIC is {wanted!r}, but ranks are threads of one process; expected auto",
                op="Communicator",
            )
        return "threads"
    if wanted == "ipc" and len(set(hosts)) > 1:
        raise InvalidArgument(
            "MOECOMM_CUDA_FABRIC is 'ipc', but ranks are on several hosts; expected auto or nccl",
            op="Communicator",
        )
    if wanted == "ipc" and not all(ipc):
        raise InvalidArgument(
            f"MOECOMM_CUDA_FABRIC is 'ipc', but CUDA IPC does not work between rank {list(ipc).index(False)} and the "
            "other ranks of its host; expected auto or nccl, or processes that each see all GPUs of the host",
            op="Communicator",
        )
    return "nccl" if wanted == "nccl" or len(set(hosts)) > 1 or not all(ipc) else "ipc"


def peer_access_of(comm: Any, hosts: Sequence[Any]) -> Any:
    """Make the native PeerAccess, by which the ranks of a communicator access each other's windows. Collective.

    Raises
    ------
    InvalidArgument
        NCCL is needed and cannot be used; the message has its version and the expected one.
    PeerTimeout
        A rank does not make the call within the timeout.
    """
    make, device = native().PeerAccess, comm.gpu
    threads = comm.bootstrap.threads
    ipc = [True] * comm.size if threads else _ipc_opens(comm, device, hosts)
    fabric = fabric_of(threads, hosts, ipc, Environment().cuda_fabric)
    comm.maps_peers = fabric != "nccl"
    if fabric == "nccl":
        gpu = str(torch.cuda.get_device_properties(comm.device).uuid)
        return nccl.join(
            native(),
            comm.rank,
            (comm.rank, comm.size, comm.ranks_per_node),
            device,
            gpu,
            len(set(hosts)) > 1,
            comm.collective.exchange,
            comm.timeout,
        )
    return make.threads(device) if fabric == "threads" else make.processes(device)


def _ipc_opens(comm: Any, device: int | None, hosts: Sequence[Any]) -> Any:
    """Return, by rank, whether CUDA IPC works with all ranks of its host. Collective.

    It does not work if each process sees only its own GPU.
    """
    samples = []

    def handle() -> Any:
        samples.append(native().IpcSample(device))
        return samples[0].handle()

    handles = comm.collective.everywhere("Communicator", handle)
    here = [r for r, host in enumerate(hosts) if host == hosts[comm.rank] and r != comm.rank]
    opens = comm.collective.everywhere(
        "Communicator",
        lambda: bool(handles[comm.rank]) and all(handles[r] and samples[0].opens(handles[r]) for r in here),
    )
    comm.collective.exchange(None)  # until no rank maps the sample any more
    return opens


_communicators: weakref.WeakSet[Any] = (
    weakref.WeakSet()
)  # communicators of this process that have buffers on GPUs


def _wanted_here(gpu: Any) -> Any:
    """Return {name of a communicator of this process: multiprocessors of this GPU that its kernels may occupy}.

    Kernels of one communicator run one after the other, so this is the largest num_sms of its open buffers.
    """
    process = f"{socket.gethostname()}:{os.getpid()}"
    wanted = {}
    for comm in list(_communicators):
        sizes = [b.num_sms for b in list(comm.cuda.buffers) if not b.closed]
        if sizes and comm.cuda.gpu_name == gpu and not comm.order.closed:
            wanted[f"{process}:{id(comm)}"] = max(sizes)
    return wanted


def share_of(memory: Any, op: str = "Buffer") -> Any:
    """Reserve num_sms multiprocessors for a buffer or a domain. Collective.

    Returns (tuning.Hardware of the communicator's GPU, number of ranks that share it).

    Raises
    ------
    InvalidArgument
        The open buffers of all ranks on a GPU need more multiprocessors than it has. Kernels of different ranks wait
        for each other, so all of them must run at the same time.
    """
    comm, num_sms = memory.comm, memory.num_sms

    def held() -> Any:
        with torch.cuda.device(comm.device):
            limits, name = native().device_limits(), torch.cuda.get_device_name()
            comm.cuda.gpu_name = gpu = str(torch.cuda.get_device_properties(comm.device).uuid)
        _communicators.add(comm)
        comm.cuda.buffers.add(memory)
        return gpu, *limits, name, _wanted_here(gpu), list(comm.cuda.peer_access.retired())

    sharing = comm.collective.everywhere(op, held)
    gpu, shared_bytes, sms, name, *_ = sharing[comm.rank]
    comm.cuda.peer_access.release(sorted(set.intersection(*(set(gone) for *_, gone in sharing))))
    for rank, (other, _, its_sms, its_name, *_) in enumerate(sharing):  # all ranks refuse, or none
        wanted = {}
        for there, _, _, _, theirs, _ in sharing:
            if there == other:
                wanted.update(theirs)
        if sum(wanted.values()) > its_sms:
            comm.cuda.buffers.discard(memory)
            raise InvalidArgument(
                f"{op}: num_sms is {num_sms}, and the communicators of the ranks that share {its_name} need "
                f"{sum(wanted.values())} multiprocessors together; expected at most {its_sms}, because their kernels "
                "wait for each other. The largest num_sms of each communicator's open buffers counts; pass a smaller "
                "num_sms, or close() unused buffers",
                op=op,
                rank=comm.rank,
                peer=rank,
            )
    return tuning.hardware_of(name, sms, shared_bytes), sum(other == gpu for other, *_ in sharing)


def plan_of(
    memory: Any, *, hidden: int, num_experts: int, top_k: int, max_tokens: int, dtype: Any, channels: Any
) -> Any:
    """Return the launch plan (tuning.Plan) of a BufferMemory on its communicator's GPU. Collective.

    Raises
    ------
    InvalidArgument
        As share_of.
    """
    comm = memory.comm
    hardware, shared_gpu = share_of(memory)
    traffic = tuning.Traffic(
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k,
        max_tokens=max_tokens,
        ranks=comm.size,
        ranks_per_node=comm.ranks_per_node,
        row_bytes=hidden * dtype.itemsize,
        shared_gpu=shared_gpu,
    )
    plan = tuning.plan_for(hardware, traffic, memory.num_sms)
    return plan if channels is None else tuning.with_channels(plan, channels)


def domain_plan_of(domain: Any) -> Any:
    """Return the launch plan (tuning.Plan) of a Domain on its communicator's GPU. Collective. Raises as share_of."""
    return tuning.domain_plan(share_of(domain, "Domain")[0], domain.num_sms)


class NativeBuffer(streams.OnStreams):
    """The native buffer of the cuda world. Its calls are enqueued on the current stream, one at a time."""

    def __init__(
        self,
        comm: Any,
        plan: Any,
        hidden: int,
        dtype: int,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        arena_bytes: int,
        check: bool,
    ) -> None:
        super().__init__(comm, native().Failure)
        self._buffer = native().Buffer(
            (comm.rank, comm.size, comm.ranks_per_node),
            comm.cuda.peer_access,
            comm.gpu_calls.native,
            comm.gpu,
            hidden,
            dtype,
            num_experts,
            top_k,
            max_tokens,
            plan.channels,
            plan.chunk_bytes,
            arena_bytes,
            check,
            plan.spread(),
            plan.stages,
            comm.timeout,
        )
        for name in (
            "contact",
            "fault",
            "finish_connect",
            "owns",
            "block_layout",
            "window",
            "arena",
            "counters",
            "captured_bytes",
            "release_captured",
        ):
            setattr(self, name, getattr(self._buffer, name))

    def connect(self, contacts: Any) -> None:
        """As in the cpu world. With NCCL it waits for every rank."""
        timeout, rank = self._bounds
        nccl.bounded(lambda: self._buffer.connect(contacts), timeout, what="connecting a window", rank=rank)

    def release(self) -> None:
        """Release the memory after a running call of another thread, or after the call that this thread is inside."""
        self._calls.after_call(self._buffer.release)

    def take_counters(self) -> Any:
        """As in the cpu world."""
        with self._calls.call("stats"):
            return self._buffer.take_counters()

    def trace(self, on: bool) -> None:
        """Do nothing: kernels record no timeline."""

    def take_timeline(self) -> Any:
        """As in the cpu world."""
        return []

    def dispatch(
        self,
        x: Any,
        scales: Any,
        ids: Any,
        ids_are_int32: bool,
        weights: Any,
        tokens: int,
        by_rank: bool,
        alignment: int,
        capacity: int,
        row_bytes: int,
        scale_bytes: int,
        plan: Any = None,
        scale_kind: int = 0,
        scales_by_column: bool = False,
        chosen: bool | None = None,
        routing: Any = 0,
    ) -> Any:
        """As in the cpu world, but the host chooses replicas before: `chosen` is None."""
        if capacity < 0 and plan is None and torch.cuda.is_current_stream_capturing():
            raise InvalidArgument(
                "dispatch: capacity is None while a CUDA graph is captured; expected a number of rows, because a "
                "replay cannot wait for the host",
                op="dispatch",
            )
        return self.enqueue(
            "dispatch",
            self._buffer,
            self._buffer.dispatch,
            x,
            scales,
            ids,
            ids_are_int32,
            weights,
            tokens,
            by_rank,
            alignment,
            capacity,
            row_bytes,
            scale_bytes,
            plan,
            scale_kind,
            scales_by_column,
            routing,
        )

    def refuse(self, verb: str, _: Any, why: str) -> Any:
        """Take part in a call that this rank refuses. Return a Failure if it could not be reported to all ranks."""
        return self.enqueue(verb, None, self._buffer.refuse, verb, why)

    def combine(self, *call: Any) -> Any:
        """As in the cpu world, with all arguments."""
        return self.enqueue("combine", self._buffer, self._buffer.combine, *call)


def memory_of(area: Any) -> Any:
    """Return a piece of device memory as a tensor. The tensor keeps it alive."""
    dtype = {"|u1": torch.uint8, "<i8": torch.int64}[area.__cuda_array_interface__["typestr"]]
    with torch._C.DisableTorchFunction():  # otherwise torch.set_default_device would cause a copy
        return torch.as_tensor(area, dtype=dtype, device=None)


def tensor_of(block: Any, offset: int, dtype: torch.dtype, shape: Any) -> Any:
    """Return a tensor at an offset (in bytes) of a Block. The tensor keeps the Block alive."""
    return memory_of(Piece(block, offset, dtype.itemsize * math.prod(shape))).view(dtype).view(shape)


def counts_of(counts: Any) -> Any:
    """Return a copy of int64 counts of a plan, made on the current stream. The memory of the plan is reused later."""
    return memory_of(counts).clone()
