"""Reports of a training run: results.json and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import nan
from pathlib import Path
from typing import Any

import torch

from .config import Config
from .needle import Grid
from .trainer import Row


def write_results(
    path: str | Path,
    ranks: int,
    config: Config,
    rows: list[Row],
    grids: dict[str, Grid],
    **more: Any,
) -> None:
    """Write JSON: ranks, tokens, config, one object per step, the needle grids by name, and further values."""
    whole = {
        "ranks": ranks,
        "tokens": rows[-1].tokens if rows else 0,
        "config": asdict(config),
        "steps": [row.to_json() for row in rows],
        "needle": {name: grid._asdict() for name, grid in grids.items()},
        **more,
    }
    Path(path).write_text(json.dumps(whole, indent=1) + "\n")


def plot(
    path: str | Path, rows: list[Row], loads: torch.Tensor, others: dict[str, list[Row]] | None = None
) -> None:
    """Write a PNG: losses, acceptance of MTP, balance, share of communication, and load of each expert over time.

    Parameters
    ----------
    path : path
    rows : list of Row
    loads : Tensor [steps, layers, experts]
        Picks of each expert.
    others : dict of list of Row, optional
        Other runs, by name, whose loss is drawn as well.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8))
    steps = [row.step for row in rows]

    def draw(axis: Any, title: str, unit: str, lines: dict[str, list[Any]], scale: float = 1.0) -> None:
        for name, values in lines.items():
            axis.plot(steps, [nan if v is None else v * scale for v in values], label=name)
        axis.set(title=title, xlabel="step", ylabel=unit)
        if len(lines) > 1:
            axis.legend()
        for a, b in zip(rows, rows[1:]):  # noqa: RUF007 - Python 3.10 has no pairwise over lists of records in mypy
            if a.length != b.length:
                axis.axvline(b.step, color="gray", linestyle=":")

    draw(
        axes[0, 0],
        "loss of text",
        "nats per token",
        {"next token": [r.loss for r in rows], "MTP": [r.mtp_loss for r in rows]},
    )
    for name, other in (others or {}).items():
        axes[0, 0].plot(
            [r.step for r in other], [nan if r.loss is None else r.loss for r in other], "--", label=name
        )
    axes[0, 0].legend()
    draw(
        axes[0, 1],
        "secrets found, and tokens of MTP accepted",
        "%",
        {"words of secrets": [r.needles for r in rows], "MTP": [r.accepted for r in rows]},
        100,
    )
    draw(
        axes[0, 2],
        "balance of the worst layer",
        "busiest expert / mean",
        {"balance": [r.balance for r in rows]},
    )
    draw(
        axes[1, 0],
        "communication (waiting included)",
        "% of step time",
        {"share": [r.communication for r in rows]},
        100,
    )
    draw(axes[1, 1], "learning rate", "", {"rate": [r.learning_rate for r in rows]})
    relative = loads / loads.mean(-1, keepdim=True).clamp(min=1e-9)
    shown = axes[1, 2].imshow(relative.flatten(1).T, aspect="auto", vmin=0, vmax=3, interpolation="nearest")
    axes[1, 2].set(title="load of every layer's experts / mean", xlabel="step", ylabel="layer x expert")
    figure.colorbar(shown)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
