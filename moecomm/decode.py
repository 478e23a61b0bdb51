"""The decode path: dispatch and combine in microseconds, split into a send and a receive phase.

docs/decode.md describes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from functools import partial

import torch
from torch.autograd import forward_ad

from ._cuda import decode as cuda_decode
from ._native import core
from .arguments import FLOATS, IDS, known, shares_memory
from .elastic.verdict import require_generation
from .decode_results import DecodeHandle, DecodeReceived, DecodeTensors
from .decode_failures import DecodeFailures, check_decode_limits
from .errors import InvalidArgument
from .making import open_by_call, require_num_experts
from .refusals import Part, made
from .shapes import DTYPES, QUANTS, SCALE_DTYPES, WIRES
from .tensors import address, picks_of, refuse_gradients, wants_gradient

if TYPE_CHECKING:
    from .backend import Backend
    from .memory import BufferMemory

__all__ = ["Decode", "DecodeHandle", "DecodePath", "DecodeReceived"]

Hook = Callable[[], None]  # waits for the messages of the others

_SENT, _RECEIVED, _ANSWERED, _SUMMED = 1, 2, 3, 4
_OTHER_IDS = 3  # of BadInput in csrc/base/types.hpp

core.read_tensors_of(torch.Tensor, torch.is_grad_enabled, torch._C._len_torch_dispatch_stack, forward_ad)

# Checked first: without gradients, this is the only overhead of a decode step.
_grad_enabled = torch.is_grad_enabled


class DecodePath:
    """Implements Buffer.decode_dispatch, decode_combine and decode_lost_weight. The first dispatch makes the memory."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._memory, self._checks = backend, backend.memory, backend.checks

    def dispatch(
        self,
        x: Any,
        topk_ids: Any,
        topk_weights: Any,
        quant: Any,
        scale_layout: Any,
        return_hook: bool,
        layer: int,
        num_experts: Any,
    ) -> tuple[DecodeReceived, Hook | None]:
        """See Buffer.decode_dispatch.

        Raises
        ------
        MoecommError
        """
        backend, memory = self._backend, self._memory
        decode: Decode | None = memory.decode
        if decode is None or memory.closed or not memory.comm.order.ready:
            decode = self._prepared(x, topk_ids, num_experts)
        if (
            backend.gpu_recorder is None
            and backend.router is None
            and (num_experts is None or num_experts == memory.num_experts)
        ):
            return decode.dispatch(x, topk_ids, topk_weights, quant, scale_layout, return_hook)
        with Part(backend, "decode_dispatch"):
            require_num_experts(backend, "decode_dispatch", num_experts)
            return self._dispatch(decode, x, topk_ids, topk_weights, quant, scale_layout, return_hook, layer)

    def _prepared(self, x: Any, topk_ids: Any, num_experts: Any) -> Decode:
        op, memory = "decode_dispatch", self._memory
        memory.require_open(op)
        memory.comm.order.settle()
        if memory.native is None:
            open_by_call(self._backend, op, x, topk_ids, num_experts, None)
        if memory.decode_max_tokens is None:
            memory.agree_on_decode_tokens(lambda: len(self._checks.as_rows(op, x)[0]))
        decode: Decode | None = memory.decode
        if decode is None:
            decode = memory.decode = Decode(self._backend)
        return decode

    def _dispatch(
        self,
        decode: Decode,
        x: Any,
        topk_ids: Any,
        topk_weights: Any,
        quant: Any,
        scale_layout: Any,
        return_hook: bool,
        layer: int,
    ) -> tuple[DecodeReceived, Hook | None]:
        op, checks, backend = "decode_dispatch", self._checks, self._backend
        topk_ids = checks.as_tensor(op, "topk_ids", topk_ids)
        topk_weights = checks.as_tensor(op, "topk_weights", topk_weights, optional=True)
        router = backend.router
        if router is not None:
            rows, scales = checks.as_rows(op, x)
            decode.refuse_gradients(op, x=rows, scales=scales, topk_weights=topk_weights)
            tokens = checks.x(op, rows, scales, packed=True)
            checks.picks(op, "topk_ids", topk_ids, tokens, IDS)
            if topk_weights is not None:
                checks.picks(op, "topk_weights", topk_weights, tokens, FLOATS)
            slots = router.choose_for_decode(backend, topk_ids, layer)
            gone = router.gone(layer)
            if topk_weights is not None:
                topk_weights, _ = router.account(topk_ids, topk_weights, gone)
            topk_ids = slots
        dispatch = decode.dispatch
        if backend.gpu_recorder is not None:
            dispatch = partial(backend.gpu_recorder.decode_dispatch, decode)
        received, hook = dispatch(x, topk_ids, topk_weights, quant, scale_layout, return_hook)
        if router is not None:
            router.decoding[received.handle.epoch % 2] = slots, gone
        return received, hook

    def combine(
        self,
        rows: Any,
        topk_ids: Any,
        topk_weights: Any,
        handle: Any,
        wire: Any,
        return_hook: bool,
        out: Any,
    ) -> tuple[torch.Tensor, Hook | None]:
        """See Buffer.decode_combine.

        Raises
        ------
        MoecommError
        """
        op, backend, memory = "decode_combine", self._backend, self._memory
        comm = memory.comm
        if comm.generation:
            require_generation(comm, op, "handle", getattr(getattr(handle, "decode", None), "comm", None))
        decode: Decode | None = memory.decode
        if decode is None or memory.closed or not comm.order.ready:
            memory.require_open(op)
            comm.order.settle()
            decode = memory.decode
            if decode is None:
                raise InvalidArgument(f"{op}: there was no decode_dispatch", op=op, rank=comm.rank)
        if backend.router is not None:
            slots, gone = backend.router.decoding[getattr(handle, "epoch", 0) % 2]
            if gone is not None and backend.router.renormalize and not handle.weights_travel:
                with Part(backend, op, handle):
                    topk_weights = self._renormalized(handle, topk_ids, topk_weights, gone)
            topk_ids = slots
        if backend.gpu_recorder is not None:
            with Part(backend, op, handle):
                topk_weights = self._checks.as_tensor(op, "topk_weights", topk_weights, optional=True)
                recorded: tuple[torch.Tensor, Hook | None] = backend.gpu_recorder.decode_combine(
                    decode, rows, topk_ids, topk_weights, handle, wire, return_hook, out
                )
                return recorded
        return decode.combine(rows, topk_ids, topk_weights, handle, wire, return_hook, out)

    def _renormalized(self, handle: Any, topk_ids: Any, topk_weights: Any, gone: torch.Tensor) -> Any:
        op, checks = "decode_combine", self._checks
        topk_ids = checks.as_tensor(op, "topk_ids", topk_ids)
        topk_weights = checks.as_tensor(op, "topk_weights", topk_weights, optional=True)
        checks.picks(op, "topk_ids", topk_ids, handle.tokens, IDS)
        if topk_weights is not None:
            checks.picks(op, "topk_weights", topk_weights, handle.tokens, FLOATS)
        return self._backend.router.account(topk_ids, topk_weights, gone)[0]

    def lost_weight(self, topk_ids: Any, topk_weights: Any, layer: int) -> torch.Tensor:
        """See Buffer.decode_lost_weight.

        Raises
        ------
        MoecommError
        """
        op, memory, checks, router = "decode_lost_weight", self._memory, self._checks, self._backend.router
        memory.require_open(op)
        decode: Decode | None = memory.decode
        if decode is None:
            checks.refuse(op, "there was no decode_dispatch; expected one before")
        topk_ids = checks.as_tensor(op, "topk_ids", topk_ids)
        topk_weights = checks.as_tensor(op, "topk_weights", topk_weights, optional=True)
        tokens = len(topk_ids) if topk_ids.ndim else 0
        checks.picks(op, "topk_ids", topk_ids, tokens, IDS)
        if topk_weights is not None:
            checks.picks(op, "topk_weights", topk_weights, tokens, FLOATS)
        gone: torch.Tensor | None = decode.gone
        if router is not None:
            router.require_layer(op, layer)
            gone = router.gone(layer)
        if gone is None:
            return torch.zeros(tokens, device=topk_ids.device, dtype=torch.float32)
        lost = picks_of(gone, topk_ids)
        if topk_weights is not None:
            lost = lost * topk_weights.detach()
        return lost.sum(1, dtype=torch.float32)


class Decode:
    """The decode memory of a Buffer. Construction is collective."""

    def __init__(self, backend: Backend) -> None:
        memory = backend.memory
        comm = memory.comm
        comm.collective.everywhere(
            "decode",
            lambda: check_decode_limits(comm.size, memory.num_experts, memory.decode_max_tokens, comm.rank),
        )
        self._backend, self._checks, self._rank = backend, backend.checks, comm.rank
        self._hidden, self._dtype, self._device = memory.hidden, memory.dtype, comm.device
        self._quantizes = self._hidden % 16 == 0 and self._dtype != torch.float64
        self._fail = DecodeFailures(backend)
        # Handles by parity: a phase that a later dispatch catches up on finds its memory.
        self._open: list[DecodeHandle | None] = [None, None]
        self.masked: tuple[int, ...] = ()
        # Of masked ranks. A captured CUDA graph reads it, so it is written in place.
        self.gone = torch.zeros(memory.num_experts, dtype=torch.bool, device=comm.device)
        self.native: Any = comm.collective.join("decode", lambda: self._make_native(memory))
        self.native.finish_connect()
        if comm.bootstrap.threads:
            comm.bootstrap.keep(self.native)
        if backend.recorder is not None and backend.gpu_recorder is None:
            backend.recorder.record_decode(self.native)
        self.native.trace(memory.tracing)
        shape = memory.experts_per_rank, comm.size * memory.decode_max_tokens, self._hidden
        self._tensors = DecodeTensors(self.native, self._dtype, shape)

    def _make_native(self, memory: BufferMemory) -> Any:
        if memory.comm.gpu is not None:
            return cuda_decode.NativeDecode(memory, DTYPES[self._dtype])
        return core.Decode(memory.comm.native, memory.native, memory.check, memory.decode_max_tokens)

    def dispatch(
        self, x: Any, topk_ids: Any, topk_weights: Any, quant: Any, scale_layout: Any, return_hook: bool
    ) -> tuple[DecodeReceived, Hook | None]:
        """See Buffer.decode_dispatch.

        Raises
        ------
        MoecommError
        """
        if (
            known(quant, QUANTS)
            and scale_layout == "row"
            and (quant is None or self._quantizes)
            and not (_grad_enabled() and wants_gradient(x, topk_weights))
        ):
            done = self.native.try_dispatch(x, topk_ids, topk_weights, QUANTS[quant], not return_hook)
            if done is not None:
                return self._dispatched(done, QUANTS[quant], False, topk_weights is not None, return_hook)
        with Part(self._backend, "decode_dispatch"):
            return self._dispatch(x, topk_ids, topk_weights, quant, scale_layout, return_hook)

    def _dispatch(
        self, x: Any, topk_ids: Any, topk_weights: Any, quant: Any, scale_layout: Any, return_hook: bool
    ) -> tuple[DecodeReceived, Hook | None]:
        op, checks = "decode_dispatch", self._checks
        x, scales = checks.as_rows(op, x)
        topk_ids = checks.as_tensor(op, "topk_ids", topk_ids)
        topk_weights = checks.as_tensor(op, "topk_weights", topk_weights, optional=True)
        self.refuse_gradients(op, x=x, scales=scales, topk_weights=topk_weights)
        tokens = checks.x(op, x, scales, packed=True)
        checks.quant(op, quant if scales is None else None, scale_layout, scales)
        checks.picks(op, "topk_ids", topk_ids, tokens, IDS)
        if topk_weights is not None:
            checks.picks(op, "topk_weights", topk_weights, tokens, FLOATS)
        kind = QUANTS[quant] if scales is None else SCALE_DTYPES.index(scales.dtype)
        by_column, weighted = scale_layout == "column", topk_weights is not None
        made(self._backend)
        done = self.native.dispatch(
            address(x),
            address(scales),
            address(topk_ids),
            topk_ids.dtype is torch.int32,
            address(topk_weights),
            weighted,
            tokens,
            kind,
            by_column,
            not return_hook,
        )
        return self._dispatched(done, kind, by_column, weighted, return_hook)

    def _dispatched(
        self, done: Any, kind: int, by_column: bool, weighted: bool, return_hook: bool
    ) -> tuple[DecodeReceived, Hook | None]:
        if type(done) is not tuple:
            self._fail(done, "decode_dispatch")
        epoch, tokens = done
        rows = self._tensors.rows[epoch & 1]
        handle = DecodeHandle(self.native, self._fail, rows, tokens, weighted, epoch)
        received = self._tensors.received(handle, kind, by_column)
        return received, handle.receive_dispatch if return_hook else None

    def combine(
        self, rows: Any, topk_ids: Any, topk_weights: Any, handle: Any, wire: Any, return_hook: bool, out: Any
    ) -> tuple[torch.Tensor, Hook | None]:
        """See Buffer.decode_combine.

        Raises
        ------
        MoecommError
        """
        if (
            wire is None
            and out is not None
            and type(handle) is DecodeHandle
            and handle.decode is self.native
            and handle.rows is rows
            and not (_grad_enabled() and wants_gradient(rows, topk_weights))
        ):
            done = self.native.try_combine(
                handle.epoch,
                handle.tokens,
                handle.weights_travel,
                topk_ids,
                topk_weights,
                out,
                not return_hook,
            )
            if done is not None:
                return self._combined(done, handle, rows, out, return_hook)
        with Part(self._backend, "decode_combine", handle):
            return self._combine(rows, topk_ids, topk_weights, handle, wire, return_hook, out)

    def _combine(
        self, rows: Any, topk_ids: Any, topk_weights: Any, handle: Any, wire: Any, return_hook: bool, out: Any
    ) -> tuple[torch.Tensor, Hook | None]:
        op, checks = "decode_combine", self._checks
        made_by: Any = getattr(handle, "decode", None)
        checks.wire(op, wire)
        if made_by is not self.native:
            checks.refuse(
                op,
                f"handle is a {type(handle).__qualname__}; expected the handle of a decode_dispatch of this buffer",
            )
        self._check_stage(self.native.stage(handle.epoch))
        rows, topk_ids = checks.as_tensor(op, "rows", rows), checks.as_tensor(op, "topk_ids", topk_ids)
        topk_weights = checks.as_tensor(op, "topk_weights", topk_weights, optional=True)
        out = checks.as_tensor(op, "out", out, optional=True, written=True)
        try:
            self.refuse_gradients(op, rows=rows, topk_weights=topk_weights)
        except InvalidArgument:
            handle.rows.detach_()  # later steps use the window, and they are not part of this graph
            raise
        want, tokens, dtype = handle.rows, handle.tokens, self._dtype
        checks.tensor(op, "rows", rows, (want.dtype,), want.shape)
        checks.picks(op, "topk_ids", topk_ids, tokens, IDS)
        if topk_weights is not None:
            if handle.weights_travel:
                checks.refuse(
                    op, "topk_weights is given; decode_dispatch has sent the weights, expected None"
                )
            checks.picks(op, "topk_weights", topk_weights, tokens, FLOATS)
        if out is None:
            out = torch.empty((tokens, self._hidden), dtype=dtype, device=self._device)
        else:
            checks.tensor(op, "out", out, (dtype,), (tokens, self._hidden))
        checks.apart(op, out, rows=rows, topk_ids=topk_ids, topk_weights=topk_weights)
        if not shares_memory(rows, want):
            for name, t in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
                if t is not None and shares_memory(t, want):
                    checks.refuse_staged(op, name)
        checks.start(op, rows=rows, out=out)
        made(self._backend)
        done = self.native.combine(
            handle.epoch,
            address(rows),
            address(topk_ids),
            topk_ids.dtype is torch.int32,
            address(topk_weights),
            WIRES[wire],
            address(out),
            not return_hook,
        )
        return self._combined(done, handle, rows, out, return_hook)

    def _combined(
        self, done: Any, handle: DecodeHandle, rows: torch.Tensor, out: torch.Tensor, return_hook: bool
    ) -> tuple[torch.Tensor, Hook | None]:
        if done is not True:
            self._fail(done, "decode_combine")
        if not return_hook:
            return out, None
        self._open[handle.epoch & 1] = handle
        return out, handle.keep(rows, out)

    def raise_late(self) -> None:
        """Raise what has become of calls on a GPU for which no host waited.

        Raises
        ------
        MoecommError
        """
        failure = self.native.fault()
        if failure is not None:
            self._fail(failure, "decode_combine" if failure.detail == _OTHER_IDS else "decode_dispatch")

    def refuse_gradients(self, op: str, **tensors: torch.Tensor | None) -> None:
        """Refuse tensors that require a gradient, which the decode path would drop.

        Raises
        ------
        InvalidArgument
        """
        refuse_gradients(op, ", or use dispatch and combine", rank=self._rank, **tensors)

    def _check_stage(self, stage: int) -> None:
        if stage in (_RECEIVED, _SUMMED):
            return
        why = {
            0: "is too old (two later dispatches use its memory), or its dispatch failed",
            _SENT: "has not been received; expected its dispatch's hook to be called first",
            _ANSWERED: "is being combined, or this rank has refused its combine; expected the hook of that combine "
            "to be called first, or a new dispatch",
        }.get(stage, "is over, because a rank has refused its dispatch or combine; expected a new dispatch")
        raise InvalidArgument(f"decode_combine: handle {why}", op="decode_combine", rank=self._rank)
