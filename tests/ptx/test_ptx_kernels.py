"""Kernels compiled by nvcc, on the machine of tools/ptx.

The quantization kernels run here; `make ptx-check` runs the cuda world's tests on the others.
"""

import os

import emulated_gpu
import pytest
import torch
from ptx_machine import build

from moecomm import quant

pytestmark = [
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
    pytest.mark.skipif(os.environ.get("EMULATED_KERNELS") != "ptx", reason="make ptx-check runs it"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 128), (3, 48), (2, 300), (130, 17), (257, 200)]


def gpu():
    return emulated_gpu.the_gpu()


def stream():
    return gpu().current_stream().cuda_stream


def values(shape, dtype):
    """Make values of many magnitudes, with zeros, infinities and NaN."""
    g = torch.Generator().manual_seed(shape[0])
    x = torch.randn(shape, generator=g) * torch.exp2(5 * (torch.rand(shape, generator=g) - 0.5))
    x[torch.rand(shape, generator=g) < 0.05] = 0.0
    if shape[0] > 2:
        x[2, ::3], x[2, 1::5] = torch.inf, torch.nan
    return x.to(dtype)


def same(a, b, what):
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    equal = a.contiguous().view(view) == b.contiguous().view(view)
    if a.dtype.is_floating_point and a.element_size() > 1:
        equal |= torch.isnan(a) & torch.isnan(b)
    assert equal.all(), f"{what}: {int((~equal).sum())} elements differ"


def on_both(monkeypatch, call):
    """Run a call with the CPU code and with the kernels, which get the CPU's tensors."""
    want = call()
    monkeypatch.setattr(
        quant, "_run", lambda name, device, *args: getattr(gpu().native, name)(*args, stream()), raising=True
    )
    got = call()
    monkeypatch.undo()
    return got, want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128)])
def test_tiles(monkeypatch, dtype, tile):
    for shape in SHAPES:
        for scale in ("f32", "ue8m0"):
            x = values(shape, dtype)
            (codes, scales), (want, want_scales) = on_both(
                monkeypatch, lambda x=x, scale=scale: quant.quantize(x, tile=tile, scale=scale)
            )
            same(codes, want, f"codes of {shape}")
            same(scales, want_scales, f"scales of {shape}")
            got, expected = on_both(
                monkeypatch, lambda: quant.dequantize(want, want_scales, tile=tile, dtype=dtype)
            )
            same(got, expected, f"values of {shape}")


@pytest.mark.parametrize("scale", ["f32", "ue8m0"])
def test_transposed_tiles(monkeypatch, scale):
    for shape in SHAPES:
        codes, scales = quant.quantize(values(shape, torch.bfloat16))
        (got, got_scales), (want, want_scales) = on_both(
            monkeypatch, lambda: quant.transpose_requantize(codes, scales, scale=scale)
        )
        same(got, want, f"codes of {shape}")
        same(got_scales, want_scales, f"scales of {shape}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", ["fp8", "logfmt10"])
def test_rows_of_the_wire(monkeypatch, dtype, wire):
    for shape in [(1, 128), (9, 384), (130, 64)]:
        x = values(shape, dtype)
        got, want = on_both(monkeypatch, lambda x=x: quant.encode_wire(x, wire))
        same(got, want, f"{wire} of {shape}")
        got, want = on_both(monkeypatch, lambda: quant.decode_wire(want, shape[1], wire, dtype=dtype))
        same(got, want, f"values of {shape}")
