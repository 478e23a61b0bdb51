"""Quantization against operators of torch: contenders alternate, times are medians, and results are compared first."""

from __future__ import annotations

import statistics
import time

import torch

from moecomm import options, quant, reference_quant


def arguments(parser):
    """Add the options of the command."""
    parser.add_argument(
        "--rows", type=options.tokens, default=1024, help="rows, a multiple of 128 (default 1024)"
    )
    parser.add_argument(
        "--hidden", type=options.tokens, default=7168, help="columns, a multiple of 128 (default 7168)"
    )
    parser.add_argument(
        "--repeats", type=options.positive, default=15, help="runs of each contender (default 15)"
    )
    parser.add_argument(
        "--threads",
        type=options.positive,
        default=1,
        help="threads of torch (default 1); the kernels of moecomm use one",
    )


def main(args):
    """Print one line per operation: median time, GB/s of BF16, ratio. The exit status is 1 if a result differs."""
    torch.set_num_threads(args.threads)
    x = torch.randn((args.rows, args.hidden), generator=torch.Generator().manual_seed(0)).bfloat16()
    print(
        f"{'operation':<22} {'moecomm us':>10} {'torch us':>10} {'GB/s':>6} {'ratio':>6} {'#wrong':>6}   "
        f"[{args.rows}, {args.hidden}] bf16"
    )
    total_wrong = 0
    for name, own, in_torch in contenders(x):
        wrong = sum(
            int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum())
            for a, b in zip(own(), in_torch(), strict=True)
        )
        times = {own: [], in_torch: []}
        for _ in range(args.repeats):
            for run, taken in times.items():
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
        mine, other = (statistics.median(times[run]) for run in (own, in_torch))
        print(
            f"{name:<22} {1e6 * mine:>10.0f} {1e6 * other:>10.0f} {2e-9 * x.numel() / mine:>6.1f} "
            f"{other / mine:>6.1f} {wrong:>6}"
        )
        total_wrong += wrong
    return int(total_wrong > 0)


def contenders(x):
    """Yield (operation, function of moecomm, function of torch). The functions return the tensors to compare."""
    codes, scales = quant.quantize(x)
    coded = quant.encode_wire(x, "logfmt10")
    parts = reference_quant.encode_logfmt10(x)
    width = x.shape[1]
    yield "quantize 1x128", lambda: quant.quantize(x), lambda: rows_in_torch(x)
    yield (
        "quantize 128x1",
        lambda: quant.quantize(x, tile=(128, 1)),
        lambda: reference_quant.quantize(x, (128, 1)),
    )
    yield (
        "dequantize 1x128",
        lambda: (quant.dequantize(codes, scales, dtype=x.dtype),),
        lambda: (values_in_torch(codes, scales, x.dtype),),
    )
    yield (
        "transpose_requantize",
        lambda: quant.transpose_requantize(codes, scales),
        lambda: rows_in_torch(values_in_torch(codes, scales, torch.float32).t().contiguous()),
    )
    yield (
        "encode logfmt10",
        lambda: (quant.encode_wire(x, "logfmt10"),),
        lambda: (reference_quant.pack_logfmt10(*reference_quant.encode_logfmt10(x)),),
    )
    yield (
        "decode logfmt10",
        lambda: (quant.decode_wire(coded, width, "logfmt10", dtype=x.dtype),),
        lambda: (reference_quant.decode_logfmt10(*parts, width).to(x.dtype),),
    )


def rows_in_torch(x):
    """quantize in torch, for finite values and a width that is a multiple of 128."""
    tiles = x.float().view(x.shape[0], -1, 128)
    amax = tiles.abs().amax(-1, keepdim=True).clamp_min(448 * 2.0**-126)
    most = torch.tensor(448.0)
    return (tiles * (most / amax)).to(torch.float8_e4m3fn).view(x.shape), (amax / most).squeeze(-1)


def values_in_torch(codes, scales, dtype):
    """The inverse of rows_in_torch."""
    return (codes.float().view(codes.shape[0], -1, 128) * scales[..., None]).view(codes.shape).to(dtype)
