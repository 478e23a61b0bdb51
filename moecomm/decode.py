"""The decode path: dispatch and combine in microseconds, split into a send and a receive phase.

docs/decode.md tells how it works.
"""

from __future__ import annotations

from typing import Any

import math
from functools import partial

import torch
from torch.autograd import forward_ad

from ._cuda import cuda, decode as cuda_decode
from ._native import core
from ._native.core import DecodeHandle, DecodeReceived
from ._native.quant import scale_words
from .arguments import describe, known, shares_memory
from .decode_failures import DecodeFailures, check_decode_limits
from .errors import InvalidArgument
from .refusals import Part, made
from .shapes import DTYPES, QUANTS, SCALE_DTYPES, WIRES
from .tensors import address, refuse_gradients, wants_gradient

__all__ = ["Decode", "DecodeHandle", "DecodeReceived", "DecodeVerbs"]

_SENT, _RECEIVED = 1, 2
_IDS = (torch.int64, torch.int32)

core.read_tensors_of(torch.Tensor, torch.is_grad_enabled, torch._C._len_torch_dispatch_stack, forward_ad)

# Asked first: where gradients are off, a decode step pays for nothing else.
_grad_enabled = torch.is_grad_enabled


class DecodeVerbs:
    """The decode verbs of Buffer, which makes their memory when it is first asked for."""

    def decode_dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_ids: torch.Tensor,
        *,
        topk_weights: torch.Tensor | None = None,
        quant: str | None = "fp8",
        scale_layout: str = "row",
        return_hook: bool = True,
        layer: int = 0,
    ) -> tuple[DecodeReceived, Any]:
        """Carry every token to the ranks that own its experts, with the least delay. Collective.

        Parameters
        ----------
        x : Tensor [T, hidden], or (fp8 Tensor [T, hidden], scales), as for dispatch
            T may differ between ranks and be 0.
        topk_ids : Tensor [T, top_k] int64 or int32
            Global expert ids, distinct in a token; -1: no expert.
        topk_weights : Tensor [T, top_k] float32, optional
            The weights travel, and decode_combine brings one weighted row per token and rank back instead of
            one per expert.
        quant : "fp8", "fp8_ue8m0" or None
            Rows are quantized on their way out, with f32 or power-of-two scales; None keeps the dtype of x.
            Without meaning where x is quantized already.
        scale_layout : "row" or "column"
            Of recv.scales: strides (hidden/128, 1) within an expert, or (1, rows rounded up to a multiple of 4).
        return_hook : bool
            True: only send; the hook waits for what others sent, and nothing runs in between. False: both.
        layer : int
            Of the placement, where the buffer has one.

        Returns
        -------
        (DecodeReceived, hook)
            To be read after hook(); hook is None with return_hook=False. The dispatch after the next one
            overwrites it. Allocates nothing; no result depends on a host decision.

        Raises
        ------
        InvalidArgument
            Nothing moved and the buffer stays usable. On every rank, from the hook: .peer names the one that refuses its part, if it is another.
        ConfigMismatch
            Ranks disagree about dtype, quantization or topk_weights; the buffer stays usable.
        PeerLost, PeerTimeout
            A peer is gone or stalled; the communicator is broken.

        Source: DeepSeek-V3 technical report, section 3.4.2 (decoding: direct point-to-point transfers).
        """
        if self._decode is None or self._closed or not self.comm._ready:
            self._require_open("decode_dispatch")
            self.comm._settle()
            self._decode = self._decode or Decode(self)
        decode = self._decode
        if decode is None:  # another thread has closed the buffer meanwhile
            self._require_open("decode_dispatch")
        if self._gpu_recorder is None and self._replica_router is None:
            return decode.dispatch(x, topk_ids, topk_weights, quant, scale_layout, return_hook)
        with Part(self, "decode_dispatch"):
            return self._decode_dispatch(
                decode, x, topk_ids, topk_weights, quant, scale_layout, return_hook, layer
            )

    def _decode_dispatch(self, decode, x, topk_ids, topk_weights, quant, scale_layout, return_hook, layer):
        topk_ids = self._as_tensor("decode_dispatch", "topk_ids", topk_ids)
        topk_weights = self._as_tensor("decode_dispatch", "topk_weights", topk_weights, optional=True)
        if self._replica_router is not None:
            rows, scales = self._as_rows("decode_dispatch", x)
            decode.refuse_gradients("decode_dispatch", x=rows, scales=scales, topk_weights=topk_weights)
            self._check_picks(
                "decode_dispatch",
                "topk_ids",
                topk_ids,
                self._check_x("decode_dispatch", rows, scales, packed=True),
                _IDS,
            )
            topk_ids = self._replica_router.choose_for_decode(self, topk_ids, layer)
        dispatch = (
            decode.dispatch
            if self._gpu_recorder is None
            else partial(self._gpu_recorder.decode_dispatch, decode)
        )
        received, hook = dispatch(x, topk_ids, topk_weights, quant, scale_layout, return_hook)
        if self._replica_router is None:
            return received, hook
        self._replica_router.decoding[received.handle.epoch % 2] = topk_ids
        return received, hook

    def decode_combine(
        self,
        rows: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        handle: DecodeHandle,
        *,
        wire: str | None = None,
        return_hook: bool = True,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Carry the experts' rows of a decode_dispatch back and sum them. Collective.

        Parameters
        ----------
        rows : Tensor [experts per rank, size * decode_max_tokens, hidden] of the buffer's dtype
            Laid out as DecodeReceived.x. handle.rows is sent without a staging copy; unchanged until the hook.
        topk_ids : Tensor [T, top_k]
            As given to decode_dispatch.
        topk_weights : Tensor [T, top_k] float32 or None
            None: ones; must be None where decode_dispatch sent the weights.
        handle : DecodeHandle
            Of the dispatch; good for one combine, until the dispatch after the next one.
        wire : None, "fp8" or "logfmt10"
            How rows cross between nodes: as they are, or coded (and decoded into the FP32 sum).
        return_hook : bool
            True: only send; y is complete after the hook. False: both.
        out : Tensor [T, hidden], optional
            Where y goes, apart from rows, ids and weights and outside this buffer's windows; a new tensor where None.

        Returns
        -------
        (y [T, hidden], hook)
            y[t] = sum over k of topk_weights[t, k] * row(t, k), in FP32 (FP64 for float64), ascending k,
            rounded once. Weights sent by decode_dispatch: every rank sums its rows so and rounds; y sums these
            in the order of each rank's first pick. Bit-identical from run to run.

        Raises
        ------
        InvalidArgument, ConfigMismatch, PeerLost, PeerTimeout
            As decode_dispatch. A refusal uses the handle up; ranks that wait for nothing from the refusing one complete.

        Source: DeepSeek-V3 technical report, section 3.4.2.
        """
        if self._decode is None or self._closed or not self.comm._ready:
            self._require_open("decode_combine")
            self.comm._settle()
            if self._decode is None:
                raise InvalidArgument(
                    "decode_combine: there was no decode_dispatch", op="decode_combine", rank=self.comm.rank
                )
        decode = self._decode
        if decode is None:  # another thread has closed the buffer meanwhile
            self._require_open("decode_combine")
        if self._replica_router is not None:
            topk_ids = self._replica_router.decoding[getattr(handle, "epoch", 0) % 2]
        if self._gpu_recorder is not None:
            with Part(self, "decode_combine", handle):
                topk_weights = self._as_tensor("decode_combine", "topk_weights", topk_weights, optional=True)
                return self._gpu_recorder.decode_combine(
                    decode, rows, topk_ids, topk_weights, handle, wire, return_hook, out
                )
        return decode.combine(rows, topk_ids, topk_weights, handle, wire, return_hook, out)


class Decode:
    """The decode memory of a Buffer. Construction is collective."""

    def __init__(self, buffer):
        comm = buffer.comm
        comm._everywhere(
            "decode",
            lambda: check_decode_limits(comm.size, buffer.num_experts, buffer.decode_max_tokens, comm.rank),
        )
        self.buffer, self.rank = buffer, comm.rank
        self.hidden, self.dtype = buffer.hidden, buffer.dtype
        self.native = comm._join("decode", self._make_native)
        self.native.connected()
        if comm._bootstrap.threads:
            comm._bootstrap.keep(self.native)
        if buffer._recorder is not None and buffer._gpu_recorder is None:
            buffer._recorder.record_decode(self.native)
        self.native.trace(buffer._tracing)
        self._make_tensors(buffer.experts_per_rank, comm.size * buffer.decode_max_tokens)

    def _make_native(self):
        buffer, fail = self.buffer, DecodeFailures(self.buffer)
        if buffer.comm._gpu is not None:
            return cuda_decode.NativeDecode(buffer, DTYPES[self.dtype], fail)
        return core.Decode(buffer.comm._native, buffer._native, buffer._check, fail, buffer.decode_max_tokens)

    @torch.inference_mode(False)  # whoever calls first: they are used outside, too
    def _make_tensors(self, experts, rows):
        def matrices(name, dtype):
            return [_tensor(self.native.area(name, p), dtype, (experts, rows, self.hidden)) for p in (0, 1)]

        def scales(kind, by_column):
            if kind == 0 or self.hidden % 16:
                return [None, None]
            words, column = scale_words(self.hidden, kind), -(-rows // 4) * 4
            area = self.native.scale_area // 4
            strides = (area, *((1, column) if by_column else (words, 1)))
            return [
                _tensor(self.native.area("scales", p), SCALE_DTYPES[kind], (experts * area,)).as_strided(
                    (experts, rows, words), strides
                )
                for p in (0, 1)
            ]

        x = matrices("x", self.dtype) + (matrices("x", torch.float8_e4m3fn) if self.hidden % 16 == 0 else [])
        counts = [_tensor(self.native.area("counts", p), torch.int64, (experts,)) for p in (0, 1)]
        self.native.hold(
            x,
            [
                t
                for kind, by_column in ((0, 0), (1, 0), (2, 0), (1, 1), (2, 1))
                for t in scales(kind, by_column)
            ],
            counts,
            [_without_base(t) for t in matrices("rows", self.dtype)],
        )

    def dispatch(self, x, topk_ids, topk_weights, quant, scale_layout, return_hook):
        """As Buffer.decode_dispatch.

        Raises
        ------
        MoecommError
        """
        if (
            known(quant, QUANTS)
            and scale_layout == "row"
            and (quant is None or self.hidden % 16 == 0 and self.dtype != torch.float64)
            and not (_grad_enabled() and wants_gradient(x, topk_weights))
        ):
            done = self.native.try_dispatch(x, topk_ids, topk_weights, QUANTS[quant], not return_hook)
            if done is not None:
                return done
        with Part(self.buffer, "decode_dispatch"):
            return self._dispatch(x, topk_ids, topk_weights, quant, scale_layout, return_hook)

    def _dispatch(self, x, topk_ids, topk_weights, quant, scale_layout, return_hook):
        op, buffer = "decode_dispatch", self.buffer
        x, scales = buffer._as_rows(op, x)
        topk_ids, topk_weights = (
            buffer._as_tensor(op, "topk_ids", topk_ids),
            buffer._as_tensor(op, "topk_weights", topk_weights, optional=True),
        )
        self.refuse_gradients(op, x=x, scales=scales, topk_weights=topk_weights)
        tokens = buffer._check_x(op, x, scales, packed=True)
        buffer._check_quant(op, quant if scales is None else None, scale_layout, scales)
        buffer._check_picks(op, "topk_ids", topk_ids, tokens, _IDS)
        if topk_weights is not None:
            buffer._check_picks(op, "topk_weights", topk_weights, tokens, (torch.float32,))
        kind = QUANTS[quant] if scales is None else SCALE_DTYPES.index(scales.dtype)
        made(buffer)
        return self.native.dispatch(
            address(x),
            address(scales),
            address(topk_ids),
            topk_ids.dtype is torch.int32,
            address(topk_weights),
            topk_weights is not None,
            tokens,
            kind,
            scale_layout == "column",
            not return_hook,
        )

    def combine(self, rows, topk_ids, topk_weights, handle, wire, return_hook, out):
        """As Buffer.decode_combine.

        Raises
        ------
        MoecommError
        """
        if wire is None and out is not None and not (_grad_enabled() and wants_gradient(rows, topk_weights)):
            done = self.native.try_combine(rows, topk_ids, topk_weights, handle, out, not return_hook)
            if done is not None:
                return done
        with Part(self.buffer, "decode_combine", handle):
            return self._combine(rows, topk_ids, topk_weights, handle, wire, return_hook, out)

    def _combine(self, rows, topk_ids, topk_weights, handle, wire, return_hook, out):
        op, buffer = "decode_combine", self.buffer
        if not known(wire, WIRES) or (wire is not None and self.dtype is torch.float64):
            choices = "None (float64)" if self.dtype is torch.float64 else ", ".join(map(repr, WIRES))
            raise InvalidArgument(f"{op}: wire is {wire!r}; expected {choices}", op=op, rank=self.rank)
        if getattr(handle, "decode", None) is not self.native:
            raise InvalidArgument(
                f"{op}: handle is a {type(handle).__qualname__}; expected the handle of a decode_dispatch of this buffer",
                op=op,
                rank=self.rank,
            )
        self._check_stage(self.native.stage(handle.epoch))
        rows, topk_ids = buffer._as_tensor(op, "rows", rows), buffer._as_tensor(op, "topk_ids", topk_ids)
        topk_weights, out = (
            buffer._as_tensor(op, "topk_weights", topk_weights, optional=True),
            buffer._as_tensor(op, "out", out, optional=True, written=True),
        )
        try:
            self.refuse_gradients(op, rows=rows, topk_weights=topk_weights)
        except InvalidArgument:
            handle.rows.detach_()  # the window serves later steps, which have no part in this graph
            raise
        want, device = handle.rows, buffer.comm.device
        if (
            rows.dtype != want.dtype
            or rows.device != device
            or rows.shape != want.shape
            or not rows.is_contiguous()
        ):
            raise InvalidArgument(
                f"{op}: rows is {describe(rows)}; expected contiguous {want.dtype} {list(want.shape)} on {device}",
                op=op,
                rank=self.rank,
            )
        tokens = handle.tokens
        buffer._check_picks(op, "topk_ids", topk_ids, tokens, _IDS)
        if topk_weights is not None:
            if handle.weights_travel:
                raise InvalidArgument(
                    f"{op}: topk_weights is given; decode_dispatch has sent the weights, expected None",
                    op=op,
                    rank=self.rank,
                )
            buffer._check_picks(op, "topk_weights", topk_weights, tokens, (torch.float32,))
        if out is None:
            out = torch.empty((tokens, self.hidden), dtype=self.dtype, device=device)
        elif (
            out.dtype != self.dtype
            or out.device != device
            or tuple(out.shape) != (tokens, self.hidden)
            or not out.is_contiguous()
        ):
            raise InvalidArgument(
                f"{op}: out is {describe(out)}; expected contiguous {self.dtype} [{tokens}, {self.hidden}] on {device}",
                op=op,
                rank=self.rank,
            )
        buffer._check_apart(op, out, rows=rows, topk_ids=topk_ids, topk_weights=topk_weights)
        if not shares_memory(rows, want):
            for name, t in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
                if t is not None and shares_memory(t, want):
                    buffer._refuse(
                        op,
                        f"{name} lies in handle.rows, to which rows are copied first; expected memory of its own, or rows = handle.rows",
                    )
        buffer._check_start(op, rows=rows, out=out)
        made(buffer)
        return self.native.combine(
            handle,
            rows,
            address(rows),
            address(topk_ids),
            topk_ids.dtype is torch.int32,
            address(topk_weights),
            WIRES[wire],
            out,
            address(out),
            not return_hook,
        )

    def refuse_gradients(self, op, **tensors):
        """Refuse tensors whose gradient the decode path would drop.

        Raises
        ------
        InvalidArgument
        """
        refuse_gradients(op, ", or use dispatch and combine", rank=self.rank, **tensors)

    def _check_stage(self, stage):
        if stage == _RECEIVED:
            return
        why = {
            0: "is too old (two later dispatches use its memory), or its dispatch failed",
            _SENT: "has not been received; expected its dispatch's hook to be called first",
        }.get(stage, "has been combined already")
        raise InvalidArgument(f"decode_combine: handle {why}", op="decode_combine", rank=self.rank)


def _tensor(area, dtype, shape):
    """The front of an Area as a tensor, which keeps it."""
    if hasattr(area, "__cuda_array_interface__"):
        return cuda.tensor_of(area, 0, dtype, shape)
    return torch.frombuffer(area, dtype=dtype, count=math.prod(shape)).view(shape)


def _without_base(t):
    """The same memory as a tensor that is no view, so that detach_() can free it of a graph."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(
        t.untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )
