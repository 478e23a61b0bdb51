"""Errors of all wire formats, for three kinds of rows: normal, with many outliers, and embeddings of a model."""

from __future__ import annotations

import json
import struct

import torch

from moecomm import archives, options, quant, reference_quant

ROWS, NODES = 1024, 4


def arguments(parser):
    """Add the options of the command."""
    parser.add_argument(
        "--embeddings",
        type=options.file_to_read,
        help=".npy or .safetensors file with an embedding table [tokens, hidden]",
    )
    parser.add_argument(
        "--hidden", type=options.tokens, default=7168, help="width of the random rows (default 7168)"
    )


def main(args):
    """Print the table. Without --embeddings it has no embeddings."""
    generator = torch.Generator().manual_seed(0)
    kinds = {"normal": torch.randn((ROWS, args.hidden), generator=generator)}
    heavy = torch.randn((ROWS, args.hidden), generator=generator)
    kinds["outlier-heavy"] = torch.where(
        torch.rand(heavy.shape, generator=generator) < 0.002, 100 * heavy, heavy
    )
    if args.embeddings:
        table = load(args.embeddings)
        kinds["embeddings"] = table[:: max(1, len(table) // ROWS)][:ROWS].contiguous()
    else:
        print("embeddings: skipped, because there is no --embeddings FILE")
    print(
        f"{'rows':<14} {'format':<22} {'bits':>6} {'SNR dB':>7} {'mean |rel|':>10} {'zeros':>8}   "
        f"{f'sum of {NODES}':>9}"
    )
    for kind, x in kinds.items():
        for name, (code, bits) in FORMATS.items():
            got = code(x)
            print(
                f"{kind:<14} {name:<22} {bits(x.shape[1]):>6.2f} {snr(got, x):>7.1f} "
                f"{relative(got, x):>10.2e} {lost(got, x):>8.2e}   "
                f"{snr(*summed(x, code)):>9.1f}"
            )
    return 0


def snr(got, exact):
    """Signal-to-noise ratio in decibels."""
    exact = exact.double()
    noise = (got.double() - exact).square().sum()
    return float(10 * torch.log10(exact.square().sum() / noise))


def relative(got, exact):
    """Mean relative error of the elements that are not zero."""
    exact = exact.double()
    some = exact != 0
    return float(((got.double() - exact)[some] / exact[some]).abs().mean())


def lost(got, exact):
    """Share of the elements that became zero."""
    return float(((got == 0) & (exact != 0)).double().mean())


def summed(x, code):
    """(FP32 sum of NODES encoded rows, exact sum), as in the last step of combine before it rounds to the dtype."""
    rows = x[: len(x) // NODES * NODES].view(NODES, -1, x.shape[1])
    return sum(code(r).float() for r in rows), rows.double().sum(0)


def _fp8(tile, scale):
    def code(x):
        codes, scales = quant.quantize(x, tile=tile, scale=scale)
        return quant.dequantize(codes, scales, tile=tile)

    return code


def _logfmt10(x):
    return quant.decode_wire(quant.encode_wire(x, "logfmt10"), x.shape[1], "logfmt10")


def _per_row(x):
    """FP8 with one scale per row, to show the benefit of tiles."""
    scales, inverse = reference_quant.tile_scales(x.float().abs().amax(1, keepdim=True))
    return reference_quant.decode_fp8(reference_quant.encode_fp8(x.float() * inverse)) * scales


# {format: (function from rows to encoded and decoded rows, function from hidden to bits per element)}
FORMATS = {
    "bf16": (torch.Tensor.bfloat16, lambda hidden: 16),
    "fp8, scale per row": (_per_row, lambda hidden: 8 + 32 / hidden),
    "fp8, 128x128": (_fp8((128, 128), "f32"), lambda hidden: 8 + 32 / 128**2),
    "fp8, 1x128": (_fp8((1, 128), "f32"), lambda hidden: 8 + 32 / 128),
    "fp8, 1x128, UE8M0": (_fp8((1, 128), "ue8m0"), lambda hidden: 8 + 8 / 128),
    "logfmt10": (_logfmt10, lambda hidden: 8 * quant.wire_bytes(hidden, "logfmt10") / hidden),
}


def load(path):
    """Load the largest embedding table [tokens, hidden] of a .npy or .safetensors file as FP32."""
    if path.endswith(".npy"):
        table = archives.read_array("--embeddings", path)
        if table.ndim != 2 or table.dtype.kind != "f" or not table.size:
            archives.refuse(
                "--embeddings",
                path,
                "array",
                f"is {table.dtype} {list(table.shape)}",
                "floats [tokens, hidden]",
            )
        return torch.from_numpy(table).float()
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(min(struct.unpack("<Q", file.read(8))[0], 1 << 27)))
            start = file.tell()
            tables = {
                n: e
                for n, e in header.items()
                if "embed" in n and len(e.get("shape", ())) == 2 and e["dtype"] in types
            }
            name, entry = max(tables.items(), key=lambda item: item[1]["shape"][0])
            file.seek(start + entry["data_offsets"][0])
            data = bytearray(file.read(entry["data_offsets"][1] - entry["data_offsets"][0]))
        table = torch.frombuffer(data, dtype=types[entry["dtype"]]).view(entry["shape"]).float()
    except Exception as error:  # any error while another kind of file is parsed
        archives.refuse(
            "--embeddings",
            path,
            "file",
            f"has no embedding table ({type(error).__name__}: {error})",
            "a .npy or .safetensors file with an embedding table",
        )
    print(f"embeddings: {name} {entry['shape']} of {path}")
    return table
