"""Low precision on whole tensors: FP8 with one scale per tile, and LogFMT-10.

The codes equal bit for bit those that dispatch(quant=...) and combine(wire=...) put on the wire. Each value that is
not finite becomes NaN and does not affect the scale of its tile. Tensors on a GPU are coded there, on the current
stream, with the same bits.

Source: DeepSeek-V3 technical report, section 3.3.2 (tiles), and "Insights into DeepSeek-V3", section 3.2 (LogFMT).
"""

from __future__ import annotations

from typing import Any

import torch

from ._cuda import cuda
from ._native import quant as _native
from .errors import InvalidArgument
from .tensors import address, plain, refuse_gradients

TILE = 128
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_FP8 = torch.float8_e4m3fn
_KINDS = {"f32": 1, "ue8m0": 2}
_TILES = {(1, TILE): 0, (TILE, 1): 1, (TILE, TILE): 2}
_WIRES = {"fp8": 1, "logfmt10": 2}
_isa = ""  # instruction set of the row kernels, set by tests; empty: the best that this machine has


def quantize(
    x: torch.Tensor, *, tile: tuple[int, int] = (1, TILE), scale: str = "f32", scale_layout: str = "row"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to FP8 e4m3 codes with one scale per tile.

    Parameters
    ----------
    x : Tensor [R, C] bfloat16, float16 or float32
    tile : (1, 128), (128, 1) or (128, 128)
        Rows and columns that share a scale. The last tiles may be smaller.
    scale : "f32" or "ue8m0"
        "f32": amax / 448 in FP32. "ue8m0": the smallest power of two that is not below it, stored as an exponent
        byte. Four bytes form an int32, along the columns of x (along its rows for tile (128, 1)).
    scale_layout : "row" or "column"
        Strides of the scales. "column" stores them by columns, and every column starts at a multiple of 16 bytes, as
        FP8 grouped GEMMs require.

    Returns
    -------
    (codes float8_e4m3fn [R, C], scales)
        scales are float32 [ceil(R / tile rows), ceil(C / tile columns)], or int32 whose packed dimension is a quarter
        of that, rounded up. value = code * scale.

    Raises
    ------
    InvalidArgument
        An argument is none of these, or x requires a gradient.

    Source: DeepSeek-V3 technical report, section 3.3.2.
    """
    op = "quantize"
    x = _check("x", x, op, *_DTYPES)
    index, kind = _choose("tile", tile, _TILES, op), _choose("scale", scale, _KINDS, op)
    _choose("scale_layout", scale_layout, {"row": 0, "column": 1}, op)
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=_FP8, device=x.device)
    packed = kind == 2 and tile == (1, TILE)  # the kernel packs rows itself
    shape = (-(-rows // tile[0]), -(-columns // tile[1]))
    scales = torch.empty(
        (rows, _native.scale_words(columns, 2)) if packed else shape,
        dtype=torch.int32 if packed else torch.float32,
        device=x.device,
    )
    _run(
        "quantize",
        x.device,
        address(codes),
        address(scales),
        address(x),
        rows,
        columns,
        _DTYPES[x.dtype],
        index,
        kind,
    )
    if kind == 2 and not packed:
        scales = pack_ue8m0(scales, dim=0 if tile == (TILE, 1) else 1)
    return codes, _by_column(scales) if scale_layout == "column" else scales


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    tile: tuple[int, int] = (1, TILE),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Convert FP8 codes back to values.

    Parameters
    ----------
    codes : Tensor [R, C] float8_e4m3fn
    scales : Tensor
        As quantize returns them, with any strides. int32 scales are UE8M0.
    tile : as for quantize
    dtype : torch.dtype
        bfloat16, float16 or float32. The FP32 product is rounded once.

    Returns
    -------
    Tensor [R, C] of dtype

    Raises
    ------
    InvalidArgument
        An argument is none of these, the shape of scales does not fit codes and tile, or a tensor requires a
        gradient.
    """
    op = "dequantize"
    codes = _check("codes", codes, op, _FP8)
    index = _choose("tile", tile, _TILES, op)
    _choose("dtype", dtype, _DTYPES, op)
    scales = _as_floats(op, scales, codes, tile)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    _run(
        "dequantize",
        codes.device,
        address(out),
        address(codes),
        address(scales),
        *codes.shape,
        _DTYPES[dtype],
        index,
    )
    return out


def transpose_requantize(
    codes: torch.Tensor, scales: torch.Tensor, *, scale: str = "f32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transpose rows with 1x128 tiles and quantize the result in 1x128 tiles, as the weight gradient needs them.

    Equal to quantize(dequantize(codes, scales).t()), in one pass and without a tensor of higher precision. If both
    scales are powers of two, only values below the smallest code of their new tile are rounded a second time.

    Parameters
    ----------
    codes : Tensor [R, C] float8_e4m3fn
    scales : Tensor [R, ceil(C/128)] float32, or int32 (UE8M0)
    scale : "f32" or "ue8m0"
        Format of the new scales.

    Returns
    -------
    (codes float8_e4m3fn [C, R], scales [C, ceil(R/128)], or int32 [C, ceil(R/512)])

    Raises
    ------
    InvalidArgument
        An argument is none of these, the shape of scales does not fit codes, or a tensor requires a gradient.

    Source: DeepSeek-V3 technical report, section 3.3.3 (activations stored in FP8).
    """
    op = "transpose_requantize"
    codes = _check("codes", codes, op, _FP8)
    kind = _choose("scale", scale, _KINDS, op)
    rows, columns = codes.shape
    scales = _as_floats(op, scales, codes, (1, TILE))
    out = torch.empty((columns, rows), dtype=_FP8, device=codes.device)
    out_scales = torch.empty((columns, -(-rows // TILE)), device=codes.device, dtype=torch.float32)
    _run(
        "transpose_requantize",
        codes.device,
        address(out),
        address(out_scales),
        address(codes),
        address(scales),
        rows,
        columns,
        kind,
    )
    return out, pack_ue8m0(out_scales) if kind == 2 else out_scales


def pack_ue8m0(scales: torch.Tensor, *, dim: int = 1) -> torch.Tensor:
    """Pack powers of two as exponent bytes, four in an int32.

    Parameters
    ----------
    scales : Tensor [A, B] float32
        Powers of two from 2**-126 to 2**127.
    dim : 0 or 1
        The dimension to pack. The lowest byte holds the scale with the lowest index; missing bytes are 0.

    Returns
    -------
    Tensor int32 [A, ceil(B/4)], or [ceil(A/4), B]

    Raises
    ------
    InvalidArgument
        scales requires a gradient.
    """
    refuse_gradients("pack_ue8m0", scales=scales)
    if dim == 0:
        return pack_ue8m0(scales.t()).t().contiguous()
    exponents = torch.nn.functional.pad(
        scales.contiguous().view(torch.int32) >> 23, (0, -scales.shape[1] % 4)
    ).to(torch.uint8)
    return exponents.view(-1).view(torch.int32).view(scales.shape[0], -(-scales.shape[1] // 4))


def unpack_ue8m0(packed: torch.Tensor, count: int, *, dim: int = 1) -> torch.Tensor:
    """Unpack the scales that pack_ue8m0 has packed.

    Parameters
    ----------
    packed : Tensor int32 [A, W] (dim 1) or [W, B] (dim 0)
    count : int
        Number of scales along dim.

    Returns
    -------
    Tensor float32 [A, count] or [count, B]
    """
    if dim == 0:
        return unpack_ue8m0(packed.t(), count).t().contiguous()
    exponents = (
        packed[:, :, None] >> torch.tensor([0, 8, 16, 24], dtype=torch.int32, device=packed.device) & 0xFF
    )
    return (exponents.flatten(1)[:, :count] << 23).view(torch.float32)


def encode_wire(x: torch.Tensor, wire: str) -> torch.Tensor:
    """Encode rows as combine(wire=...) sends them.

    Parameters
    ----------
    x : Tensor [R, hidden] bfloat16, float16 or float32
    wire : "fp8" or "logfmt10"
        fp8: the codes of a row, then a float32 scale per tile of 128 channels. logfmt10: a sign and a 9-bit code k
        per value, and low and step per tile of 128 channels. k = 0 is zero; any other code is the value +-2**(low +
        (k - 1) * step). A negative zero is NaN. low is the smallest log2 |x| of the tile, but not less than the
        largest - 32. Values are rounded to the nearest in linear space; subnormal numbers become zero.

    Returns
    -------
    Tensor uint8 [R, wire_bytes(hidden, wire)]

    Raises
    ------
    InvalidArgument
        An argument is none of these, x requires a gradient, or rows on a GPU are not a multiple of 16 bytes.

    Source: "Insights into DeepSeek-V3: Scaling Challenges and Reflections on Hardware for AI Architectures", section
    3.2.
    """
    op = "encode_wire"
    x = _check("x", x, op, *_DTYPES)
    code = _choose("wire", wire, _WIRES, op)
    rows, hidden = x.shape
    _check_wire_row("x", x.device, hidden * x.element_size(), op)
    out = torch.zeros((rows, wire_bytes(hidden, wire)), dtype=torch.uint8, device=x.device)
    _run("encode_rows", x.device, address(out), address(x), rows, hidden, _DTYPES[x.dtype], code)
    return out


def decode_wire(
    coded: torch.Tensor, hidden: int, wire: str, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Decode rows that encode_wire has encoded.

    Parameters
    ----------
    coded : Tensor uint8 [R, wire_bytes(hidden, wire)]
    hidden : int
        Elements of a row.
    wire : "fp8" or "logfmt10"
    dtype : torch.dtype
        bfloat16, float16 or float32.

    Returns
    -------
    Tensor [R, hidden] of dtype

    Raises
    ------
    InvalidArgument
        An argument is none of these, or rows on a GPU are not a multiple of 16 bytes.
    """
    op = "decode_wire"
    coded = _check("coded", coded, op, torch.uint8)
    code = _choose("wire", wire, _WIRES, op)
    _choose("dtype", dtype, _DTYPES, op)
    if coded.shape[1] != wire_bytes(hidden, wire):
        raise InvalidArgument(
            f"{op}: coded has rows of {coded.shape[1]} bytes; expected {wire_bytes(hidden, wire)}, "
            f"wire_bytes({hidden}, {wire!r})",
            op=op,
        )
    _check_wire_row("the result", coded.device, hidden * dtype.itemsize, op)
    out = torch.empty((coded.shape[0], hidden), dtype=dtype, device=coded.device)
    _run(
        "decode_rows",
        coded.device,
        address(out),
        address(coded),
        coded.shape[0],
        hidden,
        _DTYPES[dtype],
        code,
    )
    return out


def wire_bytes(hidden: int, wire: str) -> int:
    """Bytes of a row of `hidden` elements on the wire "fp8" or "logfmt10".

    Raises
    ------
    InvalidArgument
        wire is none of these.
    """
    return _native.wire_row_bytes(_choose("wire", wire, _WIRES, "wire_bytes"), hidden, 0)


def _run(name: str, device: torch.device, *args: Any) -> None:
    if device.type == "cuda":
        cuda.require(name)
        with torch.cuda.device(device):
            getattr(cuda.native(), name)(*args, torch.cuda.current_stream(device).cuda_stream)
        return
    if not getattr(_native, name)(*args, _isa):
        raise InvalidArgument(
            f"isa is {_isa!r}, which this machine lacks; expected '' or one it has", op="quant"
        )


def _choose(name: str, value: Any, choices: dict[Any, int], op: str) -> int:
    if value not in choices:
        raise InvalidArgument(
            f"{op}: {name} is {value!r}; expected one of {', '.join(map(str, choices))}", op=op
        )
    return choices[value]


def _check(name: str, t: Any, op: str, *dtypes: Any) -> torch.Tensor:
    t = plain(op, name, t)
    refuse_gradients(op, **{name: t})
    if t.dtype not in dtypes or t.dim() != 2 or t.device.type not in ("cpu", "cuda") or not t.is_contiguous():
        raise InvalidArgument(
            f"{op}: {name} is {'' if t.is_contiguous() else 'non-contiguous '}{t.dtype} {list(t.shape)} on {t.device}; "
            f"expected contiguous {' or '.join(map(str, dtypes))} with two dimensions on cpu or cuda",
            op=op,
        )
    checked: torch.Tensor = t
    return checked


def _check_wire_row(name: str, device: torch.device, row_bytes: Any, op: str) -> None:
    if device.type == "cuda" and row_bytes % 16:
        raise InvalidArgument(
            f"{op}: {name} has rows of {row_bytes} bytes; expected a multiple of 16 on a GPU", op=op
        )


def _as_floats(op: str, scales: torch.Tensor, codes: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Scales of any format and strides as contiguous floats [tile rows, tile columns]."""
    scales = plain(op, "scales", scales)
    refuse_gradients(op, scales=scales)
    shape, device = codes.shape, codes.device
    want = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    dim = 0 if tile == (TILE, 1) else 1
    packed = tuple(-(-n // 4) if i == dim else n for i, n in enumerate(want))
    if scales.device != device or (scales.dtype, tuple(scales.shape)) not in (
        (torch.float32, want),
        (torch.int32, packed),
    ):
        raise InvalidArgument(
            f"{op}: scales is {scales.dtype} {list(scales.shape)} on {scales.device}; expected float32 {list(want)} "
            f"or int32 {list(packed)} on {device}",
            op=op,
        )
    return scales.contiguous() if scales.dtype == torch.float32 else unpack_ue8m0(scales, want[dim], dim=dim)


def _by_column(scales: torch.Tensor) -> torch.Tensor:
    rows, columns = scales.shape
    column = torch.zeros((columns, -(-rows // 4) * 4), dtype=scales.dtype, device=scales.device)
    out = column.t()[:rows]
    out.copy_(scales)
    return out
