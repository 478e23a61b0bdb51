"""What the decode verbs return, in every world: DecodeReceived, its DecodeHandle, and the tensors in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import math
from functools import partial

import torch

from ._cuda import cuda

from ._native.quant import scale_words
from .shapes import SCALE_DTYPES, require_count_dtype


class DecodeReceived:
    """What decode_dispatch returns; to be read after its hook.

    .x [experts per rank, size * decode_max_tokens, hidden]: the rows of local expert e are x[e, :counts[e]], in order
    (source rank, source token); what lies behind them is undefined. .scales [.., hidden/128] f32 (int32
    [.., hidden/512] for UE8M0) of quantized rows, else None. .counts int64 [experts per rank]. .handle for
    decode_combine. The tensors are memory of the buffer: the dispatch after the next one overwrites them.
    """

    __slots__ = ("counts", "handle", "scales", "x")

    def __init__(
        self, x: torch.Tensor, scales: torch.Tensor | None, counts: torch.Tensor, handle: DecodeHandle
    ) -> None:
        self.x, self.scales, self.counts, self.handle = x, scales, counts, handle

    def counts_as(self, dtype: torch.dtype) -> torch.Tensor:
        """Return counts with another dtype: int32 for kernels that want it, or int64. A new tensor of the caller.

        Call it after the hook. On a GPU it runs on the current stream and can be captured.

        Raises
        ------
        InvalidArgument
            dtype is another one.
        """
        require_count_dtype(dtype)
        return self.counts.to(dtype, copy=True)


class DecodeHandle:
    """What decode_combine needs; good for any number of combines, until the dispatch after the next one.

    .rows [experts per rank, size * decode_max_tokens, hidden] of the buffer's dtype: a place for the experts' output.
    Written there (after the dispatch's hook) and passed to decode_combine, it is sent without a staging copy. Peers
    read it from then on: write the rows of a further combine elsewhere.
    """

    # decode: the native memory. _keep: what the second phase of the combine reads or writes.
    __slots__ = (
        "__weakref__",
        "_combines",
        "_fail",
        "_keep",
        "decode",
        "epoch",
        "rows",
        "tokens",
        "weights_travel",
    )

    def __init__(
        self, decode: Any, fail: Any, rows: torch.Tensor, tokens: int, weights_travel: bool, epoch: int
    ) -> None:
        self.decode, self._fail, self.rows = decode, fail, rows
        self.tokens, self.weights_travel, self.epoch = tokens, weights_travel, epoch
        self._keep: Any = None
        self._combines = 0

    def receive_dispatch(self) -> None:
        """The hook of decode_dispatch."""
        failure = self.decode.dispatch_receive(self.epoch)
        if failure is not None:
            self._fail(failure, "decode_dispatch")

    def receive_combine(self, number: int = 1) -> None:
        """The hook of a decode_combine: of the first, second, ... of this handle."""
        if number != self._combines:  # it has been called before
            return
        failure = self.decode.combine_receive(self.epoch)
        self._keep = None
        if failure is not None:
            self._fail(failure, "decode_combine")

    def keep(self, *tensors: torch.Tensor) -> Callable[[], None]:
        """Keep what the second phase of a combine reads or writes. Returns its hook."""
        self._keep = tensors
        self._combines += 1
        return self.receive_combine if self._combines == 1 else partial(self.receive_combine, self._combines)


class DecodeTensors:
    """The tensors of a buffer's decode memory, which its dispatches return.

    .x and .scales by (2 * kind + parity), .counts and .rows by parity of the epoch.
    """

    @torch.inference_mode(False)  # whoever calls first: they are used outside, too
    def __init__(self, native: Any, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
        experts, _, hidden = shape

        def matrices(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
            return [_tensor(native.area(name, parity), dtype, shape) for parity in (0, 1)]

        coded = matrices("x", torch.float8_e4m3fn) if hidden % 16 == 0 else []
        kinds = ((0, False), (1, False), (2, False), (1, True), (2, True))
        self.x = matrices("x", dtype) + coded
        self.scales = [t for kind, by_column in kinds for t in _scales(native, shape, kind, by_column)]
        self.counts = [_tensor(native.area("counts", parity), torch.int64, (experts,)) for parity in (0, 1)]
        self.rows = [_without_base(t) for t in matrices("rows", dtype)]

    def received(self, handle: DecodeHandle, kind: int, by_column: bool) -> DecodeReceived:
        """What a dispatch has received. kind: of the scales, by the numbers of QUANTS."""
        parity = handle.epoch & 1
        return DecodeReceived(
            self.x[2 * (kind > 0) + parity],
            self.scales[2 * (kind + 2 * by_column) + parity],
            self.counts[parity],
            handle,
        )


def _scales(
    native: Any, shape: tuple[int, int, int], kind: int, by_column: bool
) -> list[torch.Tensor | None]:
    """Scales of a kind, by parity."""
    experts, rows, hidden = shape
    if kind == 0 or hidden % 16:
        return [None, None]
    words, column = scale_words(hidden, kind), -(-rows // 4) * 4
    area = native.scale_area // 4
    strides = (area, *((1, column) if by_column else (words, 1)))
    flat = (
        _tensor(native.area("scales", parity), SCALE_DTYPES[kind], (experts * area,)) for parity in (0, 1)
    )
    return [t.as_strided((experts, rows, words), strides) for t in flat]


def _tensor(area: Any, dtype: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """The front of a DecodeArea as a tensor, which keeps it."""
    if hasattr(area, "__cuda_array_interface__"):
        on_gpu: torch.Tensor = cuda.tensor_of(area, 0, dtype, shape)
        return on_gpu
    return torch.frombuffer(area, dtype=dtype, count=math.prod(shape)).view(shape)


def _without_base(t: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that is no view, so that detach_() can free it of a graph."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(
        t.untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )
