"""The cuda world: whether it can be used here, windows on GPUs, and how calls meet streams.

Buffers of a communicator with device="cuda" are those of the cpu world in every respect but these: tensors live on
the GPU; calls are kernels on the caller's current stream; with a `capacity` nothing waits for the host, so calls
may be captured into CUDA graphs (call each of them once before); a failure of such a call is raised by a later one.

A piece of the window is free again when the last tensor on it is dropped: use the tensors on the stream of the
buffer's calls, or synchronize before dropping them. What a captured call uses stays its own (Buffer.release_captured).
"""

from __future__ import annotations

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

from . import nccl, tuning
from .._native import core
from ..env import Environment
from ..errors import InvalidArgument
from .exclusive import Exclusive


def built():
    """What setup.py noted: no_cuda and no_nccl, why that is not in this build, or None."""
    note = Path(core.__file__).parent / "built.json"
    return json.loads(note.read_text()) if note.exists() else {}


def why_not():
    """None where the cuda world can be used here, else the reason."""
    if importlib.util.find_spec("moecomm._native.cuda") is None:
        return f"this build has no CUDA extension: {built().get('no_cuda') or 'it was left out'}, when moecomm was built (set CUDA_HOME and build again)"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    return None


def require(op):
    """Refuse where the cuda world cannot be used.

    Raises
    ------
    InvalidArgument
        It cannot, with the reason.
    """
    reason = why_not()
    if reason is not None:
        raise InvalidArgument(f"device: got 'cuda'; {reason} (python -m moecomm info)", op=op)


def native():
    """The extension module. Loaded on first use: it needs a driver."""
    return importlib.import_module("moecomm._native.cuda")


def prepare_threads():
    """For rank threads that share a GPU: their kernels must run at once, so their streams need queues of their own.

    Takes effect before the process first touches the GPU.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def spread_over_gpus(device, rank):
    """The GPU of a rank thread: the named one, else rank modulo the number of GPUs."""
    require("run_local")
    device = torch.device(device)
    return device if device.index is not None else torch.device("cuda", rank % torch.cuda.device_count())


def refuse_capture(op, comm, name, why):
    """Refuse what cannot be part of a CUDA graph, while one is captured.

    Raises
    ------
    InvalidArgument
    """
    if torch.cuda.is_current_stream_capturing():
        raise InvalidArgument(
            f"{op}: a CUDA graph is captured, and the buffer has {name}: {why}, which no replay would do; expected a buffer without it",
            op=op,
            rank=comm.rank,
        )


@contextlib.contextmanager
def own_stream(device):
    """A rank thread's current stream: on the default one, kernels of several ranks would run after each other, and wait for each other."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield stream
        stream.synchronize()


def fabric_of(threads, hosts, ipc, wanted="auto"):
    """How ranks with GPUs reach each other: "threads", "ipc" or "nccl".

    Parameters
    ----------
    threads : bool
        Whether they are threads of one process.
    hosts : sequence
        The host of every rank.
    ipc : sequence of bool
        Whether each rank shares memory with its host's other ranks by CUDA IPC. Where not, NCCL shares it by VMM handles.
    wanted : str
        MOECOMM_CUDA_FABRIC.

    Raises
    ------
    InvalidArgument
        What is wanted does not go.
    """
    if wanted not in ("auto", "ipc", "nccl"):
        raise InvalidArgument(
            f"MOECOMM_CUDA_FABRIC: got {wanted!r}; expected auto, ipc or nccl", op="Communicator"
        )
    if threads:
        if wanted != "auto":
            raise InvalidArgument(
                f"MOECOMM_CUDA_FABRIC: got {wanted!r}; rank threads reach each other by pointer, expected auto",
                op="Communicator",
            )
        return "threads"
    if wanted == "ipc" and len(set(hosts)) > 1:
        raise InvalidArgument(
            "MOECOMM_CUDA_FABRIC: got 'ipc' with ranks on several hosts; expected auto or nccl",
            op="Communicator",
        )
    if wanted == "ipc" and not all(ipc):
        raise InvalidArgument(
            f"MOECOMM_CUDA_FABRIC: got 'ipc', which rank {list(ipc).index(False)} cannot use with its host's other ranks (does each process see all GPUs?); "
            "expected auto or nccl",
            op="Communicator",
        )
    return "nccl" if wanted == "nccl" or len(set(hosts)) > 1 or not all(ipc) else "ipc"


def reach_of(comm, hosts):
    """How the ranks of this communicator reach each other's windows: the extension's Reach. Collective.

    Raises
    ------
    InvalidArgument
        The NCCL that is here cannot join them, with its version and what is expected.
    PeerTimeout
        A rank does not come.
    """
    make, device = native().Reach, comm._gpu
    threads = comm._bootstrap.threads
    ipc = [True] * comm.size if threads else _ipc_opens(comm, device, hosts)
    fabric = fabric_of(threads, hosts, ipc, Environment().cuda_fabric)
    if fabric == "nccl":
        gpu = str(torch.cuda.get_device_properties(comm.device).uuid)
        return nccl.join(
            native(),
            comm.rank,
            (comm.rank, comm.size, comm.ranks_per_node),
            device,
            gpu,
            len(set(hosts)) > 1,
            comm._exchange,
            comm.timeout,
        )
    return make.threads(device) if fabric == "threads" else make.processes(device)


def _ipc_opens(comm, device, hosts):
    """By rank: whether it exports memory by CUDA IPC and opens that of all ranks of its host. It does not where each process sees its own GPU alone."""
    samples = []

    def handle():
        samples.append(native().IpcSample(device))
        return samples[0].handle()

    handles = comm._everywhere("Communicator", handle)
    here = [r for r, host in enumerate(hosts) if host == hosts[comm.rank] and r != comm.rank]
    opens = comm._everywhere(
        "Communicator",
        lambda: bool(handles[comm.rank]) and all(handles[r] and samples[0].opens(handles[r]) for r in here),
    )
    comm._exchange(None)  # the sample is mapped nowhere any more
    return opens


_communicators = weakref.WeakSet()  # of this process, with buffers on GPUs


def _wanted_here(gpu):
    """{a name of a communicator of this process: multiprocessors that its kernels may hold of this GPU at once}.

    Kernels of one communicator run after each other, so that is the most that one of its open buffers takes.
    """
    process = f"{socket.gethostname()}:{os.getpid()}"
    wanted = {}
    for comm in list(_communicators):
        sizes = [b.num_sms for b in list(comm._buffers) if not getattr(b, "_closed", False)]
        if sizes and comm._gpu_name == gpu and not comm._closed:
            wanted[f"{process}:{id(comm)}"] = max(sizes)
    return wanted


def plan_of(buffer, *, hidden, num_experts, top_k, max_tokens, dtype, channels):
    """The tuning.Plan of a buffer on its communicator's GPU. Collective.

    Raises
    ------
    InvalidArgument
        The ranks on this GPU want more multiprocessors than it has, those of all their open buffers counted: kernels of
        different ranks wait for each other, so all must run at once.
    """
    comm, num_sms = buffer.comm, buffer.num_sms

    def held():
        with torch.cuda.device(comm.device):
            limits, name = native().device_limits(), torch.cuda.get_device_name()
            comm._gpu_name = gpu = str(torch.cuda.get_device_properties(comm.device).uuid)
        _communicators.add(comm)
        comm._buffers.add(buffer)
        return gpu, *limits, name, _wanted_here(gpu), list(comm._reach.retired())

    sharing = comm._everywhere("Buffer", held)
    gpu, shared_bytes, sms, name, *_ = sharing[comm.rank]
    comm._reach.release(sorted(set.intersection(*(set(gone) for *_, gone in sharing))))
    for rank, (other, _, its_sms, its_name, *_) in enumerate(
        sharing
    ):  # on every rank alike: all refuse, or none
        wanted = {}
        for there, _, _, _, theirs, _ in sharing:
            if there == other:
                wanted.update(theirs)
        if sum(wanted.values()) > its_sms:
            comm._buffers.discard(buffer)
            raise InvalidArgument(
                f"Buffer: num_sms is {num_sms} on each of the ranks that share {its_name}, {sum(wanted.values())} in all; expected at most its "
                f"{its_sms}, since their kernels wait for each other. The largest open buffer of every communicator of these ranks' "
                "processes counts: give fewer num_sms, or close() buffers that are not used any more",
                op="Buffer",
                rank=comm.rank,
                peer=rank,
            )
    traffic = tuning.Traffic(
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k,
        max_tokens=max_tokens,
        ranks=comm.size,
        ranks_per_node=comm.ranks_per_node,
        row_bytes=hidden * dtype.itemsize,
        shared_gpu=sum(other == gpu for other, *_ in sharing),
    )
    plan = tuning.plan_for(tuning.hardware_of(name, sms, shared_bytes), traffic, num_sms)
    return plan if channels is None else tuning.replace(plan, channels=channels)


class NativeBuffer:
    """What Buffer calls: the extension's buffer, on the current stream, with one call at a time in stream order."""

    def __init__(self, comm, plan, hidden, dtype, num_experts, top_k, max_tokens, arena_bytes, check):
        self._device = comm.device
        self._buffer = native().Buffer(
            (comm.rank, comm.size, comm.ranks_per_node),
            comm._reach,
            comm._gpu,
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
        self._comm, self._bounds = comm, (comm.timeout, comm.rank)
        self._calls = Exclusive(comm.rank)
        for name in (
            "card",
            "connected",
            "owns",
            "block_layout",
            "window",
            "arena",
            "counters",
            "fault",
            "captured_bytes",
            "release_captured",
        ):
            setattr(self, name, getattr(self._buffer, name))

    def connect(self, cards):
        """As the cpu world's; NCCL's windows wait for every rank."""
        timeout, rank = self._bounds
        nccl.bounded(lambda: self._buffer.connect(cards), timeout, what="connecting a window", rank=rank)

    def release(self):
        """Waits for a call of another thread; a call that this thread is inside keeps the memory until its end."""
        self._calls.after_call(self._buffer.release)

    def take_counters(self):
        """As the cpu world's."""
        with self._calls.call("stats"):
            return self._buffer.take_counters()

    def trace(self, on):
        """Kernels keep no timeline of their roles."""

    def take_timeline(self):
        """As the cpu world's."""
        return []

    def stream(self):
        """The current stream, as the native code takes it."""
        return torch.cuda.current_stream(self._device).cuda_stream

    def enqueue(self, op, call, *args):
        """call(*args, stream) on the current stream, behind the communicator's earlier calls. Where one of them has failed for good, its
        Failure instead."""
        with self._calls.call(op):
            return self._enqueue(self._comm, call, *args)

    def _enqueue(self, comm, call, *args):
        broken = comm._native.broken()
        if broken is not None:
            return broken
        stream = torch.cuda.current_stream(self._device)
        capturing = torch.cuda.is_current_stream_capturing()
        before, done = comm._latest
        if before is not None and stream != before and not capturing:
            stream.wait_event(
                done
            )  # two kernels of a rank could each keep the other's blocks, or another rank's, from running
        result = call(*args, stream.cuda_stream)
        if isinstance(result, native().Failure):
            comm._native.note(result)
        if not capturing:
            comm._latest = stream, stream.record_event()
        return result

    def dispatch(
        self,
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
        plan=None,
        scale_kind=0,
        scales_by_column=False,
        chosen=None,
    ):
        """As the cpu world's, but that replicas are chosen before: `chosen` is None."""
        if capacity < 0 and plan is None and torch.cuda.is_current_stream_capturing():
            raise InvalidArgument(
                "dispatch: capacity is None while a graph is captured; expected a number of rows, since nothing can wait for the "
                "host there",
                op="dispatch",
            )
        return self.enqueue(
            "dispatch",
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
        )

    def refuse(self, verb, _, why):
        """Take this rank's part in a call that it refuses: None, or the Failure with which not all ranks could be told."""
        return self.enqueue(verb, self._buffer.refuse, verb, why)

    def combine(self, rows, weights, y, bias, bias_stride, plan, output, back=0, slots=0, wire=0):
        """As the cpu world's."""
        return self.enqueue(
            "combine",
            self._buffer.combine,
            rows,
            weights,
            y,
            bias,
            bias_stride,
            plan,
            output,
            back,
            slots,
            wire,
        )


class Pending:
    """A call on the communicator's own stream; keeps its inputs alive until it is waited for.

    .event: after the call; a stream that reads the result waits for it, as wait() makes the current stream do.
    """

    span = None

    def __init__(self, comm, work, keep, then=None):
        caller = torch.cuda.current_stream(comm.device)
        if comm._stream is None:
            comm._stream = torch.cuda.Stream(
                comm.device, priority=-1
            )  # before the blocks of a long kernel that has not started them all
        comm._stream.wait_stream(caller)
        with torch.cuda.stream(comm._stream):
            self._result = work()
            self.event = comm._stream.record_event()
        self._comm, self._device, self._keep, self._then = comm, comm.device, keep, then

    def wait(self):
        """The call's result, after which the current stream may use it. The host does not wait.

        Raises
        ------
        InvalidArgument
            This is a forked child.
        """
        self._comm._require_here("wait")
        torch.cuda.current_stream(self._device).wait_event(self.event)
        then, self._keep, self._then = self._then, None, None
        if then is not None:
            then(self._result)
        return self._result

    def done(self):
        """Whether the GPU is through with the call."""
        return self.event.query()


def memory_of(area):
    """A piece of device memory that the extension describes, as a tensor that keeps it."""
    dtype = {"|u1": torch.uint8, "<i8": torch.int64}[area.__cuda_array_interface__["typestr"]]
    with torch._C.DisableTorchFunction():  # torch.set_default_device would have a copy made there
        return torch.as_tensor(area, dtype=dtype, device=None)


class _Piece:
    """Some bytes of a block, which keeps it: a tensor of them begins at its storage's beginning, as compilers expect."""

    def __init__(self, block, offset, count):
        self._block, whole = block, block.__cuda_array_interface__
        self.__cuda_array_interface__ = {
            **whole,
            "shape": (count,),
            "data": (whole["data"][0] + offset, False),
        }


def tensor_of(block, offset, dtype, shape):
    """A tensor of this shape at an offset (bytes) of a Block, which lives as long as the tensor."""
    return memory_of(_Piece(block, offset, dtype.itemsize * math.prod(shape))).view(dtype).view(shape)


def counts_of(counts):
    """A copy of int64 counts in a plan, made on the current stream: the plan's memory is used again later."""
    return memory_of(counts).clone()
