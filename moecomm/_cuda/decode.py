"""The decode path of the cuda world, on the current stream.

Each phase is one kernel; with return_hook=False, one kernel does both phases of a verb. Between the phases, no moecomm
code runs on the GPU. Kernels count the epochs in device memory, so a captured graph can be replayed any number of
times. A graph must contain complete steps: call the hooks of earlier steps before the capture, and do not use a handle
both inside and outside of the graph.
"""

from __future__ import annotations

from typing import Any

from . import cuda, nccl


class NativeDecode:
    """As core.Decode of the cpu world, on streams."""

    def __init__(self, memory: Any, dtype: int) -> None:
        comm = memory.comm
        self._buffer = memory.native
        self._native = cuda.native().Decode(
            (comm.rank, comm.size, comm.ranks_per_node),
            comm.cuda.peer_access,
            comm.gpu_calls.native,
            comm.gpu,
            memory.hidden,
            dtype,
            memory.num_experts,
            memory.top_k,
            memory.decode_max_tokens,
            memory.check,
            memory.plan.spread(),
            memory.plan.stages,
            comm.timeout,
        )
        self.in_extension = self._native
        self._bounds = comm.timeout, comm.rank
        for name in ("contact", "window", "area", "counters", "take_counters", "fault", "rest", "mask"):
            setattr(self, name, getattr(self._native, name))

    def connect(self, contacts: Any) -> None:
        """As in the cpu world. With NCCL it waits for every rank."""
        timeout, rank = self._bounds
        nccl.bounded(
            lambda: self._native.connect(contacts),
            timeout,
            what="connecting the decode path's windows",
            rank=rank,
        )

    def finish_connect(self) -> None:
        """Do nothing: connect has completed the connection."""

    def trace(self, on: bool) -> None:
        """Do nothing: kernels record no timeline."""

    def take_timeline(self) -> Any:
        """As in the cpu world."""
        return []

    @property
    def scale_area(self) -> Any:
        """Distance between the scales of two experts in bytes."""
        return self._native.scale_area

    def _run(self, op: str, call: Any, *args: Any) -> Any:
        return self._buffer.enqueue(op, self._native, call, *args)

    def try_dispatch(self, *_: Any) -> None:
        """Return None: tensors on a GPU are always checked in Python."""

    def try_combine(self, *_: Any) -> None:
        """Return None: tensors on a GPU are always checked in Python."""

    def dispatch(self, *call: Any) -> Any:
        """As in the cpu world. Return (epoch, tokens) or a Failure."""
        failure = self._run("decode_dispatch", self._native.dispatch, *call)
        return failure or (self._native.epoch, call[6])

    def dispatch_receive(self, epoch: int) -> Any:
        """As in the cpu world."""
        return self._run("decode_dispatch", self._native.dispatch_receive, epoch)

    def combine(self, *call: Any) -> Any:
        """As in the cpu world. Return True or a Failure."""
        return self._run("decode_combine", self._native.combine, *call) or True

    def combine_receive(self, epoch: int) -> Any:
        """As in the cpu world."""
        return self._run("decode_combine", self._native.combine_receive, epoch)

    @property
    def epoch(self) -> Any:
        """Number of the latest dispatch."""
        return self._native.epoch

    def refuse(self, verb: str, epoch: int, why: str) -> Any:
        """As NativeBuffer.refuse."""
        return self._buffer.enqueue(verb, None, self._native.refuse, verb, epoch, why)

    def stage(self, epoch: int) -> Any:
        """State of an epoch: 0: a later epoch uses its memory, 1: sent, 2: received, 3: sent back, 4: summed."""
        return self._native.stage(epoch, self._buffer.stream())
