"""The decode path of the cuda world: what moecomm.decode calls, on the current stream.

Each phase is one kernel, or both of a verb where return_hook is False; between the two nothing of ours runs on the GPU.
The kernels number the epochs in device memory, so a captured graph may be replayed any number of times. A graph must be
whole: the hooks of what was sent before it are called before the capture, and handles do not cross its ends.
"""

from __future__ import annotations

from . import cuda, nccl


class DecodeReceived:
    """What decode_dispatch returns; see moecomm.decode.DecodeReceived."""

    def __init__(self, handle, x, scales, counts):
        self.handle, self.x, self.scales, self.counts = handle, x, scales, counts


class DecodeHandle:
    """What decode_combine needs; see moecomm.decode.DecodeHandle."""

    def __init__(self, decode, epoch, tokens, weights_travel, rows):
        self.decode, self.epoch, self.tokens, self.weights_travel, self.rows = (
            decode,
            epoch,
            tokens,
            weights_travel,
            rows,
        )
        self._keep = None

    def receive_dispatch(self):
        """The hook of decode_dispatch: enqueued on the current stream."""
        self.decode._run("decode_dispatch", self.decode._native.dispatch_receive, self.epoch)

    def receive_combine(self):
        """The hook of decode_combine: enqueued on the current stream."""
        self.decode._run("decode_combine", self.decode._native.combine_receive, self.epoch)
        self._keep = None


class NativeDecode:
    """As the cpu world's core.Decode, on streams."""

    def __init__(self, buffer, dtype, fail):
        comm = buffer.comm
        self._buffer, self._fail = buffer._native, fail
        self._native = cuda.native().Decode(
            (comm.rank, comm.size, comm.ranks_per_node),
            comm._reach,
            comm._gpu,
            buffer.hidden,
            dtype,
            buffer.num_experts,
            buffer.top_k,
            buffer.decode_max_tokens,
            buffer._check,
            buffer._plan.spread(),
            buffer._plan.stages,
            comm.timeout,
        )
        self._current = [None, None]
        self._bounds = comm.timeout, comm.rank
        for name in ("card", "window", "area", "counters", "take_counters"):
            setattr(self, name, getattr(self._native, name))

    def connect(self, cards):
        """As the cpu world's; NCCL's windows wait for every rank."""
        timeout, rank = self._bounds
        nccl.bounded(
            lambda: self._native.connect(cards),
            timeout,
            what="connecting the decode path's windows",
            rank=rank,
        )

    def connected(self):
        """Nothing is left to do."""

    def trace(self, on):
        """Kernels keep no timeline of their roles."""

    def take_timeline(self):
        """As the cpu world's."""
        return []

    @property
    def scale_area(self):
        """Bytes from one expert's scales to the next one's."""
        return self._native.scale_area

    def hold(self, x, scales, counts, rows):
        """The tensors that dispatches hand out."""
        self._x, self._scales, self._counts, self._rows = x, scales, counts, rows

    def _run(self, op, call, *args):
        failure = self._buffer.enqueue(op, call, *args)
        if failure is not None:
            self._fail(failure, op)

    def try_dispatch(self, *_):
        """None: tensors are always looked at in Python."""

    def try_combine(self, *_):
        """None: tensors are always looked at in Python."""

    def dispatch(self, x, scales, ids, ids_are_int32, weights, weighted, tokens, quant, by_column, receive):
        """(DecodeReceived, hook or None)"""
        self._run(
            "decode_dispatch",
            self._native.dispatch,
            x,
            scales,
            ids,
            ids_are_int32,
            weights,
            weighted,
            tokens,
            quant,
            by_column,
            receive,
        )
        epoch = self._native.epoch
        bank = epoch % 2
        handle = DecodeHandle(self, epoch, tokens, weighted, self._rows[bank])
        received = DecodeReceived(
            handle,
            self._x[2 * (quant > 0) + bank],
            self._scales[2 * (quant + 2 * by_column) + bank],
            self._counts[bank],
        )
        return received, None if receive else handle.receive_dispatch

    def combine(self, handle, rows, rows_at, ids, ids_are_int32, weights, wire, out, y, receive):
        """(out, hook or None)"""
        self._run(
            "decode_combine",
            self._native.combine,
            handle.epoch,
            rows_at,
            ids,
            ids_are_int32,
            weights,
            wire,
            y,
            receive,
        )
        if receive:
            return out, None
        handle._keep = rows, out
        self._current[handle.epoch % 2] = (
            handle  # a phase that a later dispatch catches up on finds its memory
        )
        return out, handle.receive_combine

    @property
    def epoch(self):
        """Number of the latest dispatch."""
        return self._native.epoch

    def refuse(self, verb, epoch, why):
        """As NativeBuffer.refuse."""
        return self._buffer.enqueue(verb, self._native.refuse, verb, epoch, why)

    def stage(self, epoch):
        """0 its places are used by a later epoch, 1 sent, 2 received, 3 answered, 4 done."""
        return self._native.stage(epoch, self._buffer.stream())
