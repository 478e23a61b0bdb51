"""Errors of FP8 products that are accumulated with few bits, and the effect of promotion to FP32 every 128 products.

The tensor cores of one GPU generation keep about 14 bits when they add FP8 products. The 32 products of an
instruction are shifted to the largest exponent among them, bits below the 14th are truncated, and the rest is added.
Registers keep 14 bits, too. The report does not say how the sum is added to the register. There are three
interpretations:
  --align all        the register is aligned with the 32 products, and all of them are truncated (default)
  --align products   the products are added first; then their sum and the register are aligned and truncated
  --align register   the products are added first; their sum is added to the register exactly, the result is truncated
This program emulates them bit for bit, for C = A B with e4m3 matrices and an inner dimension of 256 to 16384, and
compares them with
  promoted   the short sum is added to an FP32 register and cleared every 128 products
  FP32       the products are added one by one in FP32
It prints the difference of each from the exact sum: the root mean square and the largest error, relative to the root
mean square of C. The DeepSeek-V3 report states a maximum relative error of "nearly 2%" at K = 4096 for random
matrices. It does not say their size and distribution, or what the error is relative to. Truncated bits cancel if
products have both signs, and add up otherwise. docs/precision.md says which interpretation agrees with the report.

Source: DeepSeek-V3 technical report, sections 3.3.2 (increasing accumulation precision) and 3.5.2 (alignment of
products).
"""

import argparse

import torch

from moecomm import quant

INSTRUCTION, PROMOTE_EVERY, BITS = 32, 128, 14


def unit_of(largest):
    """(unit, 1 / unit): value of the last of BITS bits of a sum that is aligned to this FP32 magnitude."""
    biased = (largest.abs().view(torch.int32) >> 23).clamp(BITS, 240) - BITS + 1
    return (biased << 23).view(torch.float32), (254 - biased << 23).view(torch.float32)


def short_add(total, products, largest):
    """One instruction: total [M, N] plus products [M, N, 32] in BITS bits. `largest`: largest magnitude of products."""
    unit, inverse = unit_of(torch.maximum(largest, total.abs()))
    # Exact: the sum is below 2**20 units.
    aligned = (torch.trunc(products * inverse[..., None]).sum(-1) + torch.trunc(total * inverse)) * unit
    unit, inverse = unit_of(aligned)
    return torch.trunc(aligned * inverse) * unit


def short_add_apart(total, products, largest):
    """short_add in two additions: first the products, then their sum and total."""
    added = short_add(torch.zeros_like(total), products, largest)
    return short_add(total, added[..., None], added.abs())


def short_add_exactly(total, products, largest):
    """short_add_apart with an exact second addition, whose result is rounded towards zero."""
    added = short_add(torch.zeros_like(total), products, largest)
    result = total.double() + added.double()
    mantissa, exponent = torch.frexp(result)
    return torch.ldexp(torch.trunc(mantissa * 2**BITS), exponent - BITS).float()


ALIGN = {"all": short_add, "products": short_add_apart, "register": short_add_exactly}


def accumulate(a, b, sizes, add=short_add):
    """Compute {K: (short, promoted, fp32, exact)} of a[:, :K] @ b[:, :K].T for FP32 matrices of e4m3 values."""
    short, partial, promoted, fp32 = (torch.zeros((len(a), len(b))) for _ in range(4))
    exact = torch.zeros((len(a), len(b)), dtype=torch.float64)
    out = {}
    for k in range(0, sizes[-1], INSTRUCTION):
        products = a[:, None, k : k + INSTRUCTION] * b[None, :, k : k + INSTRUCTION]  # exact: 8 bits
        largest = products.abs().amax(-1)
        short, partial = add(short, products, largest), add(partial, products, largest)
        for i in range(INSTRUCTION):
            fp32 += products[..., i]
        exact += products.double().sum(-1)
        done = k + INSTRUCTION
        if done % PROMOTE_EVERY == 0:
            promoted += partial
            partial = torch.zeros_like(partial)
        if done in sizes:
            out[done] = (short.clone(), promoted.clone(), fp32.clone(), exact.clone())
    return out


def errors(got, exact):
    """Errors in percent of the root mean square of `exact`: (root mean square, largest)."""
    scale = exact.square().mean().sqrt()
    error = got.double() - exact
    return 100 * float(error.square().mean().sqrt() / scale), 100 * float(error.abs().max() / scale)


def matrices(kind, rows, k, generator):
    """Random FP32 [rows, k] with e4m3 values, the input of a tensor core."""
    x = (
        torch.randn((rows, k), generator=generator)
        if kind == "normal"
        else torch.rand((rows, k), generator=generator)
    )
    codes, _ = quant.quantize(x)
    return quant.dequantize(codes, torch.ones((rows, k // 128)))


def plot(results, path):
    """Plot the largest errors against K, one panel per kind of matrix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(5 * len(results), 3.6), sharey=True)
    for panel, (kind, table) in zip(panels, results.items(), strict=True):
        for i, name in enumerate(("14 bits", "promoted every 128", "FP32")):
            panel.loglog(
                list(table), [errors(row[i], row[3])[1] for row in table.values()], marker="o", label=name
            )
        panel.set(title=f"{kind} matrices", xlabel="K", xscale="log")
        panel.set_xticks(list(table), [str(k) for k in table], rotation=45)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("largest error, % of RMS(C)")
    panels[0].legend(loc="center")
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64, help="rows of both matrices (default 64)")
    parser.add_argument(
        "--align",
        choices=ALIGN,
        default="all",
        help="how the products of an instruction are added to the register",
    )
    parser.add_argument(
        "--plot",
        default="fp8_accumulation.png",
        help="figure to write (default fp8_accumulation.png; '' for none)",
    )
    args = parser.parse_args()
    sizes = [256 << i for i in range(7)]
    results = {}
    for kind in ("normal", "uniform"):
        generator = torch.Generator().manual_seed(0)
        a, b = (matrices(kind, args.rows, sizes[-1], generator) for _ in range(2))
        results[kind] = accumulate(a, b, sizes, ALIGN[args.align])
        print(
            f"\n{kind} matrices: error in % of RMS(C), root mean square / largest\n{'K':>6}  "
            f"{'14 bits':>18}  {'promoted':>18}  {'FP32':>18}"
        )
        for k, row in results[kind].items():
            print(
                f"{k:>6}  " + "  ".join("{:8.2g} / {:7.2g}".format(*errors(got, row[3])) for got in row[:3])
            )
        got, *_, exact = results[kind][4096]
        print(
            f"  4096: with 14 bits the largest error is "
            f"{100 * float((got - exact).abs().max() / exact.abs().mean()):.2f} % of the mean of |C|"
        )
    if args.plot:
        plot(results, args.plot)
        print(f"\nfigure: {args.plot}")


if __name__ == "__main__":
    main()
