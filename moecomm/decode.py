"""The decode path: dispatch and combine in microseconds, split into a send and a receive phase.

Buffer.decode_dispatch and Buffer.decode_combine are the public verbs; docs/decode.md tells how they work.
"""

from __future__ import annotations

import torch

from ._native import core
from .errors import InvalidArgument, raise_failure

_SENT, _RECEIVED, _ANSWERED, _DONE = 1, 2, 3, 4
_MAX_TOKENS = 1 << 20
_IDS = (torch.int64, torch.int32)


class DecodeReceived:
    """What decode_dispatch returns; to be read after its hook.

    .x [experts per rank, size * max_tokens, hidden]: the rows of local expert e are x[e, :counts[e]], in order
    (source rank, source token); what lies behind them is undefined. .scales f32 [.., hidden/128] of quantized
    rows, else None. .counts int64 [experts per rank]. .handle for decode_combine. The tensors are memory of the
    buffer: the dispatch after the next one overwrites them.
    """

    __slots__ = ("x", "scales", "counts", "handle")

    def __init__(self, x, scales, counts, handle):
        self.x, self.scales, self.counts, self.handle = x, scales, counts, handle


class DecodeHandle:
    """What decode_combine needs; good for one combine, until the dispatch after the next one.

    .rows [experts per rank, size * max_tokens, hidden] of the buffer's dtype: a place for the experts' output.
    Written there (after the dispatch's hook) and passed to decode_combine, it is sent without a staging copy.
    """

    __slots__ = ("rows", "_decode", "_epoch", "_tokens", "_weighted", "_keep")

    def __init__(self, decode, rows, epoch, tokens, weighted):
        self.rows, self._decode, self._epoch, self._tokens, self._weighted = rows, decode, epoch, tokens, weighted

    def _receive_dispatch(self):
        d = self._decode
        failure = d.native.dispatch_receive(self._epoch)
        if failure is not None:
            d.fail(failure, "decode_dispatch")

    def _receive_combine(self):
        d = self._decode
        failure = d.native.combine_receive(self._epoch)
        if failure is not None:
            d.fail(failure, "decode_combine")


class Decode:
    """The decode memory of a Buffer. Construction is collective."""

    def __init__(self, buffer):
        comm = buffer.comm
        check_shape(comm.size, buffer.num_experts, buffer.max_tokens, comm.rank)
        self.buffer, self.rank = buffer, comm.rank
        self.max_tokens, self.hidden, self.top_k, self.dtype = buffer.max_tokens, buffer.hidden, buffer.top_k, buffer.dtype
        comm._require_equal("decode", comm._exchange({"decode": True}))
        self.native = core.Decode(comm._native, buffer._native, buffer._check)
        self.native.connect(comm._bootstrap.allgather(self.native.card()))
        comm._bootstrap.barrier()
        self.native.connected()
        if comm._bootstrap.threads:
            comm._bootstrap.keep(self.native)
        shape = (buffer.experts_per_rank, comm.size * buffer.max_tokens)
        self._rows = [self._tensor("rows", p, self.dtype, *shape, self.hidden) for p in (0, 1)]
        self._counts = [self._tensor("counts", p, torch.int64, buffer.experts_per_rank) for p in (0, 1)]
        self._x = {self.dtype: [self._tensor("x", p, self.dtype, *shape, self.hidden) for p in (0, 1)]}
        self._scales = [None, None]
        if self.hidden % 16 == 0:
            self._x[torch.float8_e4m3fn] = [self._tensor("x", p, torch.float8_e4m3fn, *shape, self.hidden) for p in (0, 1)]
            self._scales = [self._tensor("scales", p, torch.float32, *shape, (self.hidden + 127) // 128) for p in (0, 1)]
        self._current = [None, None]   # by parity: keeps what a phase still to come writes into

    def _tensor(self, name, parity, dtype, *shape):
        count = 1
        for n in shape:
            count *= n
        return torch.frombuffer(self.native.area(name, parity), dtype=dtype, count=count).view(shape)

    def fail(self, failure, op):
        """Raise what a native failure stands for.

        Raises
        ------
        MoecommError
        """
        if failure.code == "invalid" and failure.detail == 3:
            raise InvalidArgument(f"{op}: topk_ids of token {failure.expected} differ from those that decode_dispatch sent; expected the same",
                                  op=op, rank=self.rank, expected=None, got=failure.got)
        raise_failure(failure, op=op, rank=self.rank)

    def dispatch(self, x, topk_ids, topk_weights, quant, return_hook):
        """As Buffer.decode_dispatch.

        Raises
        ------
        MoecommError
        """
        scales = None
        if type(x) is tuple:
            x, scales = x
            tokens = self.buffer._check_x("decode_dispatch", x, scales)
        else:
            if quant is not None:
                raise InvalidArgument(f"decode_dispatch: quant is {quant!r}; expected None", op="decode_dispatch", rank=self.rank)
            tokens = self.buffer._check_x("decode_dispatch", x, None)
        self.buffer._check_picks("decode_dispatch", "topk_ids", topk_ids, tokens, _IDS)
        weights = 0
        if topk_weights is not None:
            self.buffer._check_picks("decode_dispatch", "topk_weights", topk_weights, tokens, (torch.float32,))
            weights = topk_weights.data_ptr()
        weighted = topk_weights is not None
        row_bytes, scale_bytes, scales_at = self.buffer._row_bytes, 0, 0
        if scales is not None:
            row_bytes, scale_bytes, scales_at = self.hidden, scales.shape[1] * 4, scales.data_ptr()
        epoch = self.native.dispatch(x.data_ptr(), scales_at, topk_ids.data_ptr(), topk_ids.dtype is torch.int32, weights, weighted, tokens,
                                     row_bytes, scale_bytes, not return_hook)
        if type(epoch) is not int:
            self.fail(epoch, "decode_dispatch")
        p = epoch & 1
        handle = DecodeHandle(self, self._rows[p], epoch, tokens, weighted)
        received = DecodeReceived(self._x[x.dtype][p], None if scales is None else self._scales[p], self._counts[p], handle)
        return received, (handle._receive_dispatch if return_hook else None)

    def combine(self, rows, topk_ids, topk_weights, handle, wire, return_hook, out):
        """As Buffer.decode_combine.

        Raises
        ------
        MoecommError
        """
        op = "decode_combine"
        if wire is not None:
            raise InvalidArgument(f"{op}: wire is {wire!r}; expected None", op=op, rank=self.rank)
        if type(handle) is not DecodeHandle or handle._decode is not self:
            raise InvalidArgument(f"{op}: handle is a {type(handle).__qualname__}; expected the handle of a decode_dispatch of this buffer",
                                  op=op, rank=self.rank)
        stage = self.native.stage(handle._epoch)
        if stage != _RECEIVED:
            self._refuse(stage)
        if rows is not handle.rows:
            want = handle.rows.shape
            if rows.dtype != self.dtype or rows.device.type != "cpu" or rows.shape != want or not rows.is_contiguous():
                raise InvalidArgument(f"{op}: rows is {_describe(rows)}; expected contiguous {self.dtype} {list(want)} on cpu", op=op, rank=self.rank)
        tokens = handle._tokens
        self.buffer._check_picks(op, "topk_ids", topk_ids, tokens, _IDS)
        weights = 0
        if topk_weights is not None:
            if handle._weighted:
                raise InvalidArgument(f"{op}: topk_weights is given; decode_dispatch sent the weights, expected None", op=op, rank=self.rank)
            self.buffer._check_picks(op, "topk_weights", topk_weights, tokens, (torch.float32,))
            weights = topk_weights.data_ptr()
        if out is None:
            out = torch.empty((tokens, self.hidden), dtype=self.dtype)
        elif out.dtype != self.dtype or out.device.type != "cpu" or tuple(out.shape) != (tokens, self.hidden) or not out.is_contiguous():
            raise InvalidArgument(f"{op}: out is {_describe(out)}; expected contiguous {self.dtype} [{tokens}, {self.hidden}] on cpu",
                                  op=op, rank=self.rank)
        failure = self.native.combine(handle._epoch, rows.data_ptr(), topk_ids.data_ptr(), topk_ids.dtype is torch.int32, weights,
                                      out.data_ptr(), not return_hook)
        if failure is not None:
            self.fail(failure, op)
        if not return_hook:
            return out, None
        handle._keep = (rows, out)
        self._current[handle._epoch & 1] = handle
        return out, handle._receive_combine

    def _refuse(self, stage):
        why = {0: "is too old (two later dispatches use its memory) or its dispatch failed", _SENT: "has not been received; expected its dispatch's hook to be called first",
               _ANSWERED: "has been combined already", _DONE: "has been combined already"}[stage]
        raise InvalidArgument(f"decode_combine: handle {why}", op="decode_combine", rank=self.rank)


def check_shape(size, num_experts, max_tokens, rank):
    """Refuse what the decode path cannot hold.

    Raises
    ------
    InvalidArgument
    """
    if max_tokens > _MAX_TOKENS:
        raise InvalidArgument(f"decode: max_tokens is {max_tokens}; expected at most {_MAX_TOKENS}", op="decode", rank=rank)
    if num_experts * max_tokens >= 1 << 31:
        raise InvalidArgument(f"decode: num_experts * max_tokens is {num_experts * max_tokens}; expected less than 2**31", op="decode", rank=rank)


def _describe(t):
    return f"{'' if t.is_contiguous() else 'non-contiguous '}{t.dtype} {list(t.shape)} on {t.device}"
