"""Draws docs/layers.svg, the picture of the layers in docs/architecture.md. `python docs/make_layers.py`

The picture has a background of its own, so it can be read on a light and on a dark page.
"""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).parent / "layers.svg"
WIDTH, LEFT, GAP = 920, 30, 10
PYTHON, CYTHON, NATIVE, SHARED = "#eff6ff", "#f5f3ff", "#fff7ed", "#f0fdf4"
# (what is said on the right, [(folder, what it does)], color), from the user's program down to the hardware
ROWS = [
    (
        "Python",
        [
            ("moecomm/", "validate, document"),
            ("nn, gate, overlap", "layers"),
            ("balance", "placement"),
            ("integrations", "deep_ep, transformers"),
        ],
        PYTHON,
    ),
    ("Cython", [("moecomm/_native/", "convert arguments, release the GIL, make one call")], CYTHON),
    (
        "one per world",
        [("runtime/cpu", "threads, processes"), ("runtime/cuda", "GPUs"), ("runtime/sim", "virtual clock")],
        NATIVE,
    ),
    (
        "one for all worlds",
        [("session/", "prepares a call"), ("schedule/", "which role runs where and when")],
        SHARED,
    ),
    ("one for all worlds", [("protocol/", "roles: who copies what, who signals whom, who waits")], SHARED),
    (
        "one per world",
        [("fabric/cpu", "memory, UCX"), ("fabric/cuda", "NVLink, NCCL"), ("fabric/sim", "modeled links")],
        NATIVE,
    ),
    (
        "one for all worlds",
        [("exec/", "groups: a lane, a warp, a fiber"), ("balance/", "solvers for placements")],
        SHARED,
    ),
    ("one for all worlds", [("base/", "types, and one layout function per memory")], SHARED),
]


def draw():
    """The picture as SVG text."""
    height, boxes, y = 46, 700, 52
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {60 + len(ROWS) * (height + GAP)}" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<title>The layers of moecomm</title>",
        f'<rect width="{WIDTH}" height="{60 + len(ROWS) * (height + GAP)}" fill="#ffffff"/>',
        f'<text x="{LEFT + boxes / 2}" y="32" font-size="14" font-weight="bold" fill="#334155" text-anchor="middle">'
        "your program calls the top; each layer uses only those below it</text>",
    ]
    for said, cells, color in ROWS:
        width = (boxes - GAP * (len(cells) - 1)) / len(cells)
        for i, (name, does) in enumerate(cells):
            x = LEFT + i * (width + GAP)
            middle = x + width / 2
            out += [
                f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{height}" rx="6" fill="{color}" stroke="#64748b"/>',
                f'<text x="{middle:g}" y="{y + 19}" font-size="13" font-weight="bold" fill="#0f172a" '
                f'text-anchor="middle">{name}</text>',
                f'<text x="{middle:g}" y="{y + 36}" font-size="12" fill="#475569" text-anchor="middle">{does}</text>',
            ]
        out.append(f'<text x="{LEFT + boxes + 16}" y="{y + 28}" font-size="13" fill="#334155">{said}</text>')
        y += height + GAP
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(draw())
