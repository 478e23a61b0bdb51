"""What the arguments of a Buffer's calls must be: a wrong one is named before anything moves."""

from __future__ import annotations

import torch

from ._native.quant import scale_words
from .errors import InvalidArgument
from .results import Handle
from .shapes import QUANTS, SCALE_DTYPES, WIRES


def as_tensor(name, value, op):
    """Torch tensors as they are; anything else that speaks DLPack (NumPy, CuPy, JAX, ...) as a view of its memory.

    A producer on a GPU is asked for its data on the current stream of that GPU, which is the stream of this call: what it
    still has to write there comes before the call reads it, and nothing waits for the host.
    """
    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.from_dlpack(value)
    except (TypeError, RuntimeError, BufferError, AttributeError) as error:
        raise InvalidArgument(f"{op}: {name} is a {type(value).__qualname__}; expected a tensor or a DLPack array ({error})", op=op) from None


def describe(t):
    """A tensor in words: dtype, shape, device, and whether it has gaps."""
    return f"{'' if t.is_contiguous() else 'non-contiguous '}{t.dtype} {list(t.shape)} on {t.device}"


class Arguments:
    """The checks of Buffer, which says hidden, top_k, max_tokens, dtype and comm."""

    def _check_dispatch(self, x, scales, topk_ids, topk_weights, layout, expert_alignment, capacity, handle=None):
        op = "dispatch"
        tokens = self._check_x(op, x, scales, packed=True)
        if handle is not None:
            if topk_ids is not None:
                raise InvalidArgument(f"{op}: topk_ids and handle are both given; expected one of them", op=op)
            if tokens != handle.num_tokens:
                raise InvalidArgument(f"{op}: x has {tokens} tokens; the handle's plan is for {handle.num_tokens}", op=op)
        elif layout not in ("expert", "rank"):
            raise InvalidArgument(f"{op}: layout is {layout!r}; expected 'expert' or 'rank'", op=op)
        else:
            if topk_ids is None:
                raise InvalidArgument(f"{op}: topk_ids is None; expected ids [T, top_k], or a handle", op=op)
            self._check_picks(op, "topk_ids", topk_ids, tokens, (torch.int64, torch.int32))
            if not isinstance(expert_alignment, int) or not 1 <= expert_alignment <= 65536:
                raise InvalidArgument(f"{op}: expert_alignment is {expert_alignment!r}; expected an int in 1..65536", op=op)
            if layout == "rank" and expert_alignment != 1:
                raise InvalidArgument(f"{op}: expert_alignment is {expert_alignment}; the rank layout has no padding, expected 1", op=op)
            if capacity is not None and (not isinstance(capacity, int) or capacity < 0):
                raise InvalidArgument(f"{op}: capacity is {capacity!r}; expected an int >= 0", op=op)
        if topk_weights is not None:
            self._check_picks(op, "topk_weights", topk_weights, tokens, (torch.float32,))

    def _check_combine(self, rows, handle, topk_weights, bias, out=None, wire=None):
        op = "combine"
        if wire not in WIRES or (wire is not None and self.dtype == torch.float64):
            choices = "None for float64" if self.dtype == torch.float64 else "one of " + ", ".join(map(repr, WIRES))
            raise InvalidArgument(f"{op}: wire is {wire!r}; expected {choices}", op=op)
        n, tokens = handle.num_rows, handle.num_tokens
        if rows.dtype != self.dtype or rows.device != self.comm.device or rows.shape != (n, self.hidden) or not rows.is_contiguous():
            raise InvalidArgument(f"{op}: rows is {describe(rows)}; expected contiguous {self.dtype} [{n}, {self.hidden}] on {self.comm.device}", op=op)
        if topk_weights is not None:
            if handle.layout == "rank":
                raise InvalidArgument(f"{op}: topk_weights is given; in the rank layout the experts have applied them, expected None", op=op)
            self._check_floats(op, "topk_weights", topk_weights, (n,))
        if bias is not None and (bias.device != self.comm.device or not bias.is_floating_point()
                                 or tuple(bias.shape) not in ((self.hidden,), (tokens, self.hidden))):
            raise InvalidArgument(f"{op}: bias is {describe(bias)}; expected [{self.hidden}] or [{tokens}, {self.hidden}] on {self.comm.device}", op=op)
        if out is not None and (out.dtype != self.dtype or out.device != self.comm.device or out.shape != (tokens, self.hidden)
                                or not out.is_contiguous()):
            raise InvalidArgument(f"{op}: out is {describe(out)}; expected contiguous {self.dtype} [{tokens}, {self.hidden}] on {self.comm.device}", op=op)

    def _check_back(self, back, handle):
        self._check_floats("combine_slots", "back", back, (handle.num_rows,) if handle.layout == "expert" else (handle.num_rows, self.top_k))

    def _check_x(self, op, x, scales, packed=False):
        want = self.dtype if scales is None else torch.float8_e4m3fn
        if x.dtype != want or x.device != self.comm.device or x.dim() != 2 or x.shape[1] != self.hidden or not x.is_contiguous():
            raise InvalidArgument(f"{op}: x is {describe(x)}; expected contiguous {want} [T, {self.hidden}] on {self.comm.device}", op=op)
        tokens = x.shape[0]
        if tokens > self.max_tokens:
            raise InvalidArgument(f"{op}: x has {tokens} tokens; expected at most max_tokens = {self.max_tokens}", op=op)
        if scales is not None:
            self._check_fp8_rows(op)
            kinds = (1, 2) if packed else (1,)
            want = {SCALE_DTYPES[kind]: (tokens, scale_words(self.hidden, kind)) for kind in kinds}
            if want.get(scales.dtype) != tuple(scales.shape) or scales.device != self.comm.device or not scales.is_contiguous():
                expected = " or ".join(f"{dtype} {list(shape)}" for dtype, shape in want.items())
                raise InvalidArgument(f"{op}: scales is {describe(scales)}; expected contiguous {expected} on {self.comm.device}", op=op)
        return tokens

    def _check_fp8_rows(self, op):
        if self.hidden % 16:
            raise InvalidArgument(f"{op}: hidden is {self.hidden}; quantized rows need a multiple of 16", op=op)

    def _check_quant(self, op, quant, scale_layout, scales):
        if quant not in QUANTS:
            raise InvalidArgument(f"{op}: quant is {quant!r}; expected one of {', '.join(map(repr, QUANTS))}", op=op)
        if quant is not None:
            self._check_fp8_rows(op)
            if scales is not None:
                raise InvalidArgument(f"{op}: quant is {quant!r} and x is quantized already; expected None", op=op)
            if self.dtype == torch.float64:
                raise InvalidArgument(f"{op}: quant is {quant!r}; float64 rows travel as they are, expected None", op=op)
        if scale_layout not in ("row", "column"):
            raise InvalidArgument(f"{op}: scale_layout is {scale_layout!r}; expected 'row' or 'column'", op=op)
        if scale_layout == "column" and quant is None and scales is None:
            raise InvalidArgument(f"{op}: scale_layout is 'column' and rows are not quantized; expected 'row'", op=op)

    def _check_picks(self, op, name, t, tokens, dtypes):
        if t.dtype not in dtypes or t.device != self.comm.device or t.shape != (tokens, self.top_k) or not t.is_contiguous():
            raise InvalidArgument(f"{op}: {name} is {describe(t)}; expected contiguous {' or '.join(map(str, dtypes))} [{tokens}, {self.top_k}] on {self.comm.device}", op=op)

    def _check_floats(self, op, name, t, shape):
        if t.dtype != torch.float32 or t.device != self.comm.device or t.shape != shape or not t.is_contiguous():
            raise InvalidArgument(f"{op}: {name} is {describe(t)}; expected contiguous torch.float32 {list(shape)} on {self.comm.device}", op=op)

    def _check_handle(self, op, handle):
        if not isinstance(handle, Handle):
            raise InvalidArgument(f"{op}: handle is a {type(handle).__qualname__}; expected the handle of a dispatch", op=op)
        if handle._buffer is not self:
            raise InvalidArgument(f"{op}: handle belongs to another buffer; expected one of this buffer", op=op)
