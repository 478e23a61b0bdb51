"""The oracle of moecomm.quant: slow, obvious torch code whose results equal those of the kernels bit for bit.

Every step is one FP32 operation with rounding, in the order of csrc/base/quantize.hpp.
"""

from __future__ import annotations

from typing import Any

import torch

TILE = 128
_FP8 = torch.float8_e4m3fn
# Polynomials of the logarithm and of the power for LogFMT, highest power first.
_LOG2 = (
    -0.145757511,
    0.236882478,
    -0.250061184,
    0.286708534,
    -0.36008811,
    0.480939388,
    -0.721357107,
    1.44269478,
)
_EXP2 = (0.000154762791, 0.00134002347, 0.00961800385, 0.055503279, 0.240226507, 0.693147182, 1.0)
_ROUND = 12582912.0  # 1.5 * 2**23: adding and subtracting it rounds to the nearest even integer


def _f32(x: torch.Tensor) -> Any:
    return x.to(torch.float32)


def _bits(x: torch.Tensor) -> Any:
    return x.contiguous().view(torch.int32)


def _float(bits: torch.Tensor) -> Any:
    return bits.to(torch.int32).view(torch.float32)


def encode_fp8(x: torch.Tensor) -> Any:
    """FP32 to e4m3 codes: round to nearest even. Finite values saturate at 448; all others become NaN (0x7f)."""
    codes = x.clamp(-448, 448).to(_FP8).view(torch.uint8)
    return torch.where(torch.isfinite(x), codes, torch.full_like(codes, 0x7F)).view(_FP8)


def decode_fp8(codes: torch.Tensor) -> Any:
    """e4m3 codes to FP32."""
    nan = (codes.view(torch.uint8) & 0x7F) == 0x7F
    return codes.to(torch.float32).masked_fill(nan, float("nan"))


def tile_scales(amax: torch.Tensor, scale: str = "f32") -> Any:
    """(scale, inverse) for tiles whose largest finite magnitude is amax, FP32 of any shape."""
    amax = amax.clamp_min(448 * 2.0**-126)
    most = torch.full_like(amax, 448)
    s = amax / most
    if scale == "f32":
        return s, most / amax
    exponent = (_bits(s) + 0x007FFFFF) >> 23
    return _float(exponent << 23), _float((254 - exponent) << 23)


def _spread(scales: torch.Tensor, shape: Any, tile: tuple[int, int]) -> Any:
    """Repeat the scales of tiles to one scale per element."""
    return scales.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[: shape[0], : shape[1]]


def quantize(x: torch.Tensor, tile: tuple[int, int] = (1, TILE), scale: str = "f32") -> Any:
    """Quantize in tiles of tile[0] rows and tile[1] columns: (codes [R, C], float32 scales of the tiles)."""
    x = _f32(x)
    rows, columns = x.shape
    finite = x.abs().masked_fill(~torch.isfinite(x), 0.0)
    padded = torch.nn.functional.pad(finite, (0, -columns % tile[1], 0, -rows % tile[0]))
    amax = padded.view(-(-rows // tile[0]), tile[0], -(-columns // tile[1]), tile[1]).amax((1, 3))
    scales, inverse = tile_scales(amax, scale)
    return encode_fp8(x * _spread(inverse, x.shape, tile)), scales


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    tile: tuple[int, int] = (1, TILE),
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Values of codes with float32 scales."""
    return (decode_fp8(codes) * _spread(scales, codes.shape, tile)).to(dtype)


def transpose_requantize(codes: torch.Tensor, scales: torch.Tensor, scale: str = "f32") -> Any:
    """Transpose [R, C] with 1x128 tiles to [C, R] with 1x128 tiles."""
    return quantize(dequantize(codes, scales).t().contiguous(), (1, TILE), scale)


def log2(x: torch.Tensor) -> Any:
    """log2 of positive normal FP32 numbers."""
    b = _bits(x) + 0x004AFB0D
    f = _float((b & 0x007FFFFF) + 0x3F3504F3) - 1.0
    exponent = ((b >> 23) - 127).to(torch.float32)
    p = torch.full_like(f, _LOG2[0])
    for c in _LOG2[1:]:
        p = p * f + c
    return exponent + p * f


def exp2(y: torch.Tensor) -> Any:
    """2**y of FP32 numbers in [-126, 128)."""
    y = y.clamp(-126.0, 127.99999237060547)
    whole = (y + _ROUND) - _ROUND
    f = y - whole
    p = torch.full_like(f, _EXP2[0])
    for c in _EXP2[1:]:
        p = p * f + c
    return _float(_bits(p) + (whole.to(torch.int32) << 23))


def _tiled(x: torch.Tensor) -> Any:
    x = torch.nn.functional.pad(_f32(x), (0, -x.shape[1] % TILE))
    return x.view(x.shape[0], -1, TILE)


def encode_logfmt10(x: torch.Tensor) -> Any:
    """Encode rows: (codes int32 [R, tiles, 128], low [R, tiles], step [R, tiles]). The last tile is zero-padded."""
    x = _tiled(x)
    a = x.abs()
    finite = torch.isfinite(x)
    normal = finite & (a >= 2.0**-126)
    some = normal.any(-1)
    largest = a.masked_fill(~normal, 0.0).amax(-1)
    least = a.masked_fill(~normal, float("inf")).amin(-1)
    top, bottom = (log2(m.masked_fill(~some, 1.0)) for m in (largest, least))
    low = torch.maximum(bottom, top - 32.0)
    step = (top - low).clamp_min(0.0) / torch.full_like(top, 510.0)
    low, step = (v.masked_fill(~some, 0.0) for v in (low, step))
    inverse = step.reciprocal().masked_fill(~(step > 0), 0.0)
    level = log2(a.masked_fill(~normal, 1.0))
    place = (level - low[..., None]) * inverse[..., None] - (step * 0.0866433976)[..., None]
    k = ((place.clamp(0.0, 510.0) + _ROUND) - _ROUND).to(torch.int32) + 1
    codes = k | (torch.signbit(x).to(torch.int32) << 9)
    codes = torch.where(normal & (level >= (low - 1.0)[..., None]), codes, 0)
    return torch.where(finite, codes, 0x200), low, step


def decode_logfmt10(codes: torch.Tensor, low: torch.Tensor, step: torch.Tensor, hidden: int) -> Any:
    """Decode the result of encode_logfmt10 to FP32 rows [R, hidden]."""
    k = codes & 0x1FF
    values = exp2((k - 1).to(torch.float32) * step[..., None] + low[..., None])
    values = torch.where(codes >= 0x200, -values, values)
    zero_or_nan = torch.zeros_like(values).masked_fill(codes == 0x200, float("nan"))
    return torch.where(k == 0, zero_or_nan, values).flatten(1)[:, :hidden]


def pack_logfmt10(codes: torch.Tensor, low: torch.Tensor, step: torch.Tensor) -> Any:
    """Bytes of rows on the wire: uint8 [R, tiles * 168], zero-padded to a multiple of 16."""
    rows, tiles, _ = codes.shape
    low_bits = (codes & 0xFF).to(torch.uint8).view(rows, -1)
    quarter = (codes >> 8).view(rows, tiles, 4, 32)
    shifted: Any = sum(quarter[:, :, i] << 2 * i for i in range(4))
    high_bits = shifted.to(torch.uint8).view(rows, -1)
    heads = torch.stack([low, step], -1).contiguous().view(torch.uint8).view(rows, -1)
    packed = torch.cat([low_bits, high_bits, heads], 1)
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 16))


def pack_fp8(codes: torch.Tensor, scales: torch.Tensor) -> Any:
    """Bytes of rows on the wire: codes, then float32 scales, each zero-padded to a multiple of 16."""
    parts = codes.view(torch.uint8), scales.contiguous().view(torch.uint8)
    return torch.cat([torch.nn.functional.pad(p, (0, -p.shape[1] % 16)) for p in parts], 1)


def wire(name: str) -> Any:
    """Function for reference.combine(wire=...): an FP32 row [hidden] after encoding and decoding as `name`."""

    def fp8(row: torch.Tensor) -> Any:
        return dequantize(*quantize(row[None]))[0]

    def logfmt10(row: torch.Tensor) -> Any:
        codes, low, step = encode_logfmt10(row[None])
        return decode_logfmt10(codes, low, step, row.shape[0])[0]

    return {None: None, "fp8": fp8, "logfmt10": logfmt10}[name]
