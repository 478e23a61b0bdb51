"""The emulated tensor core compared with exact arithmetic, and the commands of docs/precision.md."""

import argparse
import importlib.util
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from bench import precision
from bench import quant as quant_bench

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(
        "fp8_accumulation", ROOT / "examples" / "fp8_accumulation.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cut(x, bits, largest):
    """Truncate x to the unit of a sum with BITS bits and largest magnitude `largest`, as rationals."""
    exponent = 0
    while Fraction(2) ** exponent > largest:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= largest:
        exponent += 1
    unit = Fraction(2) ** (exponent - bits + 1)
    return int(x / unit) * unit


def test_short_add_is_what_it_says(example):
    """Each term is truncated to 14 bits at the largest exponent, the sum is exact, and is truncated again."""
    products = example.matrices("normal", 64, 128, torch.Generator().manual_seed(3))
    products = (products[:8, None] * products[None, 8:16])[..., :32].contiguous()
    total = torch.randn((8, 8), generator=torch.Generator().manual_seed(4)) * 2.0 ** torch.arange(-8, 24, 4)
    got = example.short_add(total, products, products.abs().amax(-1))
    for i in range(8):
        for j in range(8):
            terms = [Fraction(float(v)) for v in (*products[i, j], total[i, j])]
            largest = max(map(abs, terms))
            exact = sum(cut(v, example.BITS, largest) for v in terms)
            assert Fraction(float(got[i, j])) == cut(exact, example.BITS, abs(exact)), (i, j)


def test_products_may_be_aligned_apart(example):
    """Products are truncated to 14 bits at the largest one; their sum and the total at the larger of the two."""
    products = example.matrices("normal", 64, 128, torch.Generator().manual_seed(5))
    products = (products[:8, None] * products[None, 8:16])[..., :32].contiguous()
    total = torch.randn((8, 8), generator=torch.Generator().manual_seed(6)) * 2.0 ** torch.arange(-8, 24, 4)
    got = example.short_add_apart(total, products, products.abs().amax(-1))

    def added(values):
        largest = max(map(abs, values))
        exact = sum(cut(v, example.BITS, largest) for v in values)
        return cut(exact, example.BITS, abs(exact)) if exact else exact

    for i in range(8):
        for j in range(8):
            assert Fraction(float(got[i, j])) == added(
                [Fraction(float(total[i, j])), added([Fraction(float(v)) for v in products[i, j]])]
            ), (i, j)


def test_the_register_may_be_cut_alone(example):
    """The sum of the products is added to the register exactly, and the result is truncated to 14 bits."""
    products = example.matrices("normal", 64, 128, torch.Generator().manual_seed(7))
    products = (products[:8, None] * products[None, 8:16])[..., :32].contiguous()
    total = torch.randn((8, 8), generator=torch.Generator().manual_seed(8)) * 2.0 ** torch.arange(-8, 24, 4)
    largest = products.abs().amax(-1)
    got, added = (
        example.short_add_exactly(total, products, largest),
        example.short_add(torch.zeros_like(total), products, largest),
    )
    for i in range(8):
        for j in range(8):
            exact = Fraction(float(total[i, j])) + Fraction(float(added[i, j]))
            assert Fraction(float(got[i, j])) == cut(exact, example.BITS, abs(exact)), (i, j)


def test_promotion_stops_the_error_from_growing(example):
    generator = torch.Generator().manual_seed(0)
    a, b = (example.matrices("normal", 16, 4096, generator) for _ in range(2))
    sums = example.accumulate(a, b, [256, 4096])
    torch.testing.assert_close(sums[4096][3], a.double() @ b.double().T)
    (short_at_256, _), (short, _) = (example.errors(sums[k][0], sums[k][3]) for k in (256, 4096))
    promoted, fp32 = (example.errors(sums[4096][i], sums[4096][3])[0] for i in (1, 2))
    assert short > 4 * short_at_256, "the error grows with K"
    assert fp32 < promoted / 100 and promoted < short / 5


def test_commands(capsys, tmp_path):
    """Both tables are printed, and all results of the microbenchmark equal torch's."""
    import numpy as np

    np.save(tmp_path / "table.npy", np.random.default_rng(0).standard_normal((1100, 384), dtype=np.float32))
    precision.main(argparse.Namespace(embeddings=str(tmp_path / "table.npy"), hidden=256))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 * len(precision.FORMATS) and not any("nan" in line for line in lines)
    assert quant_bench.main(argparse.Namespace(rows=256, hidden=256, repeats=1, threads=1)) == 0
