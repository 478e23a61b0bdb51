"""moecomm.quant compared with its torch oracle, bit for bit, in every build of the row kernels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moecomm
from moecomm import quant
from moecomm import reference_quant as oracle

ISAS = ["avx512", "avx2", "base"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TILES = [(1, 128), (128, 1), (128, 128)]
SHAPES = [(1, 128), (3, 48), (2, 300), (130, 17), (257, 200)]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setattr(quant, "_isa", request.param)
    try:
        quant.quantize(torch.zeros((1, 16)))
    except moecomm.InvalidArgument:
        pytest.skip(f"this machine has no {request.param}")


def tensor(shape, dtype, seed, special=True):
    """Make random values of many magnitudes, with rows of zeros, subnormals, infinities and NaN."""
    g = torch.Generator().manual_seed(seed)
    spread = 5 if dtype == torch.float16 else 40
    x = torch.randn(shape, generator=g) * torch.exp2(spread * (torch.rand(shape, generator=g) - 0.5))
    x[torch.rand(shape, generator=g) < 0.05] = 0.0
    if special and shape[0] > 2:
        x[0] = 0.0
        x[1] *= 2.0**-130
        x[2, ::3], x[2, 1::5] = math.inf, -math.nan
    return x.to(dtype)


def assert_equal(got, want, what=""):
    """Compare bits; any NaN equals any other."""
    assert got.shape == want.shape and got.dtype == want.dtype, (
        f"{what}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    )
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    same = got.contiguous().view(view) == want.contiguous().view(view)
    if got.element_size() > 1 and got.dtype.is_floating_point:
        same |= torch.isnan(got) & torch.isnan(want)
    wrong = (~same).nonzero()
    assert not len(wrong), f"{what}: {len(wrong)} elements differ, first at {wrong[0].tolist()}"


def as_floats(scales, want, tile):
    dim = 0 if tile == (128, 1) else 1
    return scales if scales.dtype == torch.float32 else quant.unpack_ue8m0(scales, want.shape[dim], dim=dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("scale", ["f32", "ue8m0"])
@pytest.mark.parametrize("scale_layout", ["row", "column"])
def test_quantize_equals_the_oracle(dtype, tile, scale, scale_layout):
    for seed, shape in enumerate(SHAPES):
        x = tensor(shape, dtype, seed)
        codes, scales = quant.quantize(x, tile=tile, scale=scale, scale_layout=scale_layout)
        want_codes, want_scales = oracle.quantize(x, tile, scale)
        assert_equal(codes, want_codes, "codes")
        assert_equal(as_floats(scales, want_scales, tile), want_scales, "scales")
        assert_equal(
            quant.dequantize(codes, scales, tile=tile, dtype=dtype),
            oracle.dequantize(want_codes, want_scales, tile, dtype),
            "values",
        )
        if scale_layout == "column":
            assert (
                scales.stride(0) == 1
                and scales.stride(1) % 4 == 0
                and scales.stride(1) >= shape[0] // tile[0]
            )
            assert scales.data_ptr() % 16 == 0


@pytest.mark.parametrize("scales", ["f32", "ue8m0"])
@pytest.mark.parametrize("scale", ["f32", "ue8m0"])
def test_transpose_requantize(scales, scale):
    for seed, shape in enumerate(SHAPES):
        stored = quant.quantize(tensor(shape, torch.bfloat16, seed), scale=scales)
        codes, got = quant.transpose_requantize(*stored, scale=scale)
        want_codes, want = oracle.transpose_requantize(
            stored[0], as_floats(stored[1], oracle.quantize(stored[0].float())[1], (1, 128)), scale
        )
        assert_equal(codes, want_codes, "codes")
        assert_equal(as_floats(got, want, (1, 128)), want, "scales")


@pytest.mark.parametrize("dtype", DTYPES)
def test_wire_rows_equal_the_oracle(dtype):
    for seed, shape in enumerate(SHAPES):
        x = tensor(shape, dtype, seed)
        coded = quant.encode_wire(x, "fp8")
        codes, scales = oracle.quantize(x)
        assert_equal(coded, oracle.pack_fp8(codes, scales), "fp8")
        assert_equal(
            quant.decode_wire(coded, shape[1], "fp8"), oracle.dequantize(codes, scales), "fp8 values"
        )
        coded = quant.encode_wire(x, "logfmt10")
        parts = oracle.encode_logfmt10(x)
        assert_equal(coded, oracle.pack_logfmt10(*parts), "logfmt10")
        assert_equal(
            quant.decode_wire(coded, shape[1], "logfmt10", dtype=dtype),
            oracle.decode_logfmt10(*parts, shape[1]).to(dtype),
            "logfmt10 values",
        )


def test_every_code_and_its_neighbors():
    """All 256 codes, the midpoints between them, and their neighbors equal torch's cast where it does not overflow."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = codes.float()[~codes.float().isnan()].sort().values
    middle = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat(
        [
            numbers,
            middle,
            *(torch.nextafter(middle, torch.full_like(middle, to)) for to in (-math.inf, math.inf)),
        ]
    )
    # A 448 in the tile sets its scale to exactly 1.
    rows = torch.cat([torch.full((len(x), 1), 448.0), x[:, None], torch.zeros((len(x), 14))], 1)
    got, scales = quant.quantize(rows)
    assert (scales == 1).all()
    assert_equal(got[:, 1], x.to(torch.float8_e4m3fn))
    assert_equal(quant.dequantize(codes[None], torch.ones((1, 2)))[0], codes.float())


def test_values_that_are_not_finite_stay_alone():
    """NaN and infinity become NaN; codes and scales of the other values are as if they were zero."""
    x = torch.linspace(-3, 5, 256).view(1, -1)
    bad = x.clone()
    bad[0, [3, 70, 200]] = torch.tensor([math.nan, math.inf, -math.inf])
    x[0, [3, 70, 200]] = 0.0
    (want, want_scales), (got, scales) = quant.quantize(x), quant.quantize(bad)
    assert_equal(scales, want_scales)
    values = quant.dequantize(got, scales)
    assert values.isnan().nonzero()[:, 1].tolist() == [3, 70, 200]
    assert_equal(values.nan_to_num(0.0), quant.dequantize(want, want_scales))
    for wire in ("fp8", "logfmt10"):
        want, got = (quant.decode_wire(quant.encode_wire(t, wire), 256, wire) for t in (x, bad))
        assert got.isnan().nonzero()[:, 1].tolist() == [3, 70, 200]
        assert_equal(got.nan_to_num(0.0), want)


def test_zero_and_subnormal_rows():
    x = torch.zeros((2, 128))
    x[1] = torch.linspace(-1, 1, 128) * 2.0**-130
    codes, scales = quant.quantize(x)
    assert (scales == 2.0**-126).all() and (codes[0].float() == 0).all()
    assert_equal(quant.dequantize(codes, scales), oracle.dequantize(*oracle.quantize(x)))
    # Half the smallest code times the smallest scale, or half a unit of three mantissa bits.
    assert (
        (quant.dequantize(codes, scales) - x).abs() <= torch.maximum(torch.tensor(2.0**-136), x.abs() / 16)
    ).all()
    assert_equal(quant.decode_wire(quant.encode_wire(x, "logfmt10"), 128, "logfmt10"), torch.zeros((2, 128)))


def test_scales_at_the_ends_of_the_range():
    most = 0.96 * torch.finfo(torch.float32).max  # values that round to 2**128 overflow
    x = torch.tensor([[most, -most] + 14 * [1.0], [448.0, 1.0] + 14 * [0.5], [449.0, 2.0] + 14 * [0.25]])
    for scale in ("f32", "ue8m0"):
        codes, scales = quant.quantize(x, scale=scale)
        values = quant.dequantize(codes, scales)
        assert (
            torch.isfinite(values).all()
            and ((values - x).abs() <= x.abs().amax(1, keepdim=True) / 28 + 1e-6).all()
        )
        if scale == "ue8m0":
            assert quant.unpack_ue8m0(scales, 1)[1:, 0].tolist() == [1.0, 2.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 2**31), st.data())
def test_any_bits(rows, sixteenths, dtype, seed, data):
    """Random bit patterns of any magnitude; every kernel is compared with the oracle."""
    columns = 16 * sixteenths - data.draw(st.integers(0, 15))
    g = torch.Generator().manual_seed(seed)
    width = torch.int16 if dtype.itemsize == 2 else torch.int32
    info = torch.iinfo(width)
    x = (
        torch.randint(info.min, info.max, (rows, columns), generator=g, dtype=torch.int64)
        .to(width)
        .view(dtype)
    )
    for tile in TILES:
        for scale in ("f32", "ue8m0"):
            got, want = quant.quantize(x, tile=tile, scale=scale), oracle.quantize(x, tile, scale)
            assert_equal(got[0], want[0], f"codes {tile} {scale}")
            assert_equal(as_floats(got[1], want[1], tile), want[1], f"scales {tile} {scale}")
    coded, parts = quant.encode_wire(x, "logfmt10"), oracle.encode_logfmt10(x)
    assert_equal(coded, oracle.pack_logfmt10(*parts), "logfmt10")
    assert_equal(
        quant.decode_wire(coded, columns, "logfmt10"),
        oracle.decode_logfmt10(*parts, columns),
        "logfmt10 values",
    )


def test_logfmt10_picks_the_nearest_level_in_linear_space():
    """Compared with brute force in float64 over all 511 levels of a tile, except for ties."""
    x = tensor((8, 128), torch.float32, 5, special=False)
    _, low, step = oracle.encode_logfmt10(x)
    got = quant.decode_wire(quant.encode_wire(x, "logfmt10"), 128, "logfmt10").double()
    k = torch.arange(511, dtype=torch.float64)
    levels = torch.cat([torch.zeros((8, 1)), torch.exp2(low.double() + k * step.double())], 1)
    error = (x.double().abs()[:, :, None] - levels[:, None, :]).abs().amin(-1)
    assert ((got - x.double()).abs() <= error + x.double().abs() * 2e-5).all()
    assert torch.equal(torch.signbit(got), torch.signbit(torch.where(got == 0, 0.0, x.double())))


def test_logfmt10_polynomials():
    x = torch.exp2(torch.linspace(-126, 127.99, 200001))
    assert (oracle.log2(x).double() - torch.log2(x.double())).abs().max() < 8e-6, (
        "half a unit in the last place at 128, and 1e-7"
    )
    y = torch.linspace(-126, 127.99, 200001)
    assert (oracle.exp2(y).double() / torch.exp2(y.double()) - 1).abs().max() < 3e-7


def test_logfmt10_rounding_is_unbiased():
    """The mean error over uniform values is far below the step; rounding the logarithm would be biased."""
    x = torch.rand((64, 128), generator=torch.Generator().manual_seed(1), dtype=torch.float32) + 0.02
    error = quant.decode_wire(quant.encode_wire(x, "logfmt10"), 128, "logfmt10").double() - x.double()
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(x.numel())


@pytest.mark.parametrize(
    "call",
    [
        lambda x: quant.quantize(x.double()),
        lambda x: quant.quantize(x[:, ::2]),
        lambda x: quant.quantize(x, tile=(1, 64)),
        lambda x: quant.quantize(x, scale="e8"),
        lambda x: quant.quantize(x, scale_layout="diagonal"),
        lambda x: quant.dequantize(x, x),
        lambda x: quant.dequantize(x.to(torch.float8_e4m3fn), torch.ones((4, 1))),
        lambda x: quant.transpose_requantize(x.to(torch.float8_e4m3fn), torch.ones((4, 2)), scale=1),
        lambda x: quant.encode_wire(x, "fp4"),
        lambda x: quant.decode_wire(torch.zeros((1, 3), dtype=torch.uint8), 256, "fp8"),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(moecomm.InvalidArgument, match="expected"):
        call(torch.ones((4, 256)))


def test_no_rows():
    for tile in TILES:
        codes, scales = quant.quantize(torch.empty((0, 256)), tile=tile)
        assert codes.shape == (0, 256) and scales.shape[0] == 0
        assert quant.dequantize(codes, scales, tile=tile).shape == (0, 256)
    assert quant.encode_wire(torch.empty((0, 256)), "logfmt10").shape == (0, 336)


def gradient_cases():
    x = torch.randn(4, 128)
    codes, scales = quant.quantize(x)
    return {
        "quantize": ("x", quant.quantize, [x]),
        "encode_wire": ("x", lambda t: quant.encode_wire(t, "fp8"), [x]),
        "dequantize": ("scales", quant.dequantize, [codes, scales]),
        "transpose_requantize": ("scales", quant.transpose_requantize, [codes, scales]),
        "pack_ue8m0": ("scales", quant.pack_ue8m0, [torch.ones(4, 4)]),
    }


@pytest.mark.parametrize(
    "op", ["quantize", "encode_wire", "dequantize", "transpose_requantize", "pack_ue8m0"]
)
def test_gradients_are_refused(op):
    """Codes have no derivative: an input that requires a gradient is named, unless gradients are off."""
    name, call, args = gradient_cases()[op]
    wanting = [*args[:-1], args[-1].clone().requires_grad_()]
    with pytest.raises(
        moecomm.InvalidArgument,
        match=rf"^{op}: {name} requires a gradient, but {op} is not differentiable; pass {name}\.detach\(\)",
    ):
        call(*wanting)
    with torch.no_grad():
        got = call(*wanting)
    want = call(*args)
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, want)), strict=True):
        assert_equal(a, b, op)


def test_gradients_of_codes_are_refused():
    codes, scales = quant.quantize(torch.randn(4, 128))
    for call in (quant.dequantize, quant.transpose_requantize):
        with pytest.raises(moecomm.InvalidArgument, match="codes requires a gradient"):
            call(codes.clone().requires_grad_(), scales)
