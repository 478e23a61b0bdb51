"""Learning rate, batch size and other settings as pure functions of the tokens seen. Run as a program, it plots them.

    python -m examples.deepseek_v3.schedule --plot schedule.png

Source: technical report, section 4.2 (hyper-parameters).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moecomm.errors import InvalidArgument


@dataclass(frozen=True)
class Schedule:
    """The schedule of a pre-training run, in tokens. The defaults are the published values.

    The learning rate rises to `peak` during warmup, stays there until plateau_end, falls along a cosine to `low` at
    cosine_end, stays there until low_end, and is `lowest` until the end. The batch grows from first_batch to batch
    sequences during ramp. gamma is the step of the gate's bias until gamma_end. alpha is the weight of the
    sequence-wise balance loss. The weight of MTP's loss is mtp_first until mtp_end, then mtp_last.
    """

    total: float = 14.8e12
    peak: float = 2.2e-4
    low: float = 2.2e-5
    lowest: float = 7.3e-6
    # 2,000 steps of about 3,072 sequences of 4,096 tokens: the batch grows little during the warmup.
    warmup: float = 2000 * 3072 * 4096
    plateau_end: float = 10e12
    cosine_end: float = 14.3e12
    low_end: float = 14.3e12 + 333e9
    first_batch: int = 3072
    batch: int = 15360
    ramp: float = 469e9
    gamma: float = 0.001
    gamma_end: float = 14.3e12
    alpha: float = 0.0001
    mtp_first: float = 0.3
    mtp_last: float = 0.1
    mtp_end: float = 10e12
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1

    def scaled(self, total: float, **changes: float) -> Schedule:
        """Scale the schedule to another number of tokens, then replace fields by `changes`.

        Raises
        ------
        InvalidArgument
            total is not positive.
        """
        if not total > 0:
            raise InvalidArgument(f"total is {total}; expected more than 0 tokens", op="Schedule.scaled")
        amounts = ("total", "warmup", "plateau_end", "cosine_end", "low_end", "ramp", "gamma_end", "mtp_end")
        by = total / self.total
        fields: dict[str, Any] = {name: getattr(self, name) * by for name in amounts} | changes
        return replace(self, **fields)


def learning_rate(tokens: float, s: Schedule) -> float:
    """Learning rate of a step after this number of tokens."""
    if tokens < s.warmup:
        return s.peak * tokens / s.warmup
    if tokens < s.plateau_end:
        return s.peak
    if tokens < s.cosine_end:
        done = (tokens - s.plateau_end) / (s.cosine_end - s.plateau_end)
        return s.low + (s.peak - s.low) * 0.5 * (1 + math.cos(math.pi * done))
    return s.low if tokens < s.low_end else s.lowest


def batch_size(tokens: float, s: Schedule) -> int:
    """Number of sequences of a step after this number of tokens."""
    grown = 1.0 if s.ramp <= 0 else min(tokens / s.ramp, 1.0)
    return s.first_batch + int((s.batch - s.first_batch) * grown)


def bias_speed(tokens: float, s: Schedule) -> float:
    """Gamma, the step of the gates' biases."""
    return s.gamma if tokens < s.gamma_end else 0.0


def mtp_weight(tokens: float, s: Schedule) -> float:
    """Lambda, the weight of the loss of MTP."""
    return s.mtp_first if tokens < s.mtp_end else s.mtp_last


def plot(s: Schedule, path: str | Path) -> None:
    """Write a PNG with all four values over the whole run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    at = [s.total * i / 2000 for i in range(2000)]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True)
    for axis, (name, of) in zip(
        axes.flat,
        {
            "learning rate": learning_rate,
            "sequences per step": batch_size,
            "gamma, speed of the gates' biases": bias_speed,
            "lambda, weight of MTP's loss": mtp_weight,
        }.items(),
        strict=True,
    ):
        axis.plot([t / s.total for t in at], [of(t, s) for t in at])
        axis.set(title=name, ylim=(0, None))
    for axis in axes[1]:
        axis.set_xlabel(f"share of {s.total:.3g} tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Plot the published schedule.")
    parser.add_argument("--plot", default="schedule.png")
    plot(Schedule(), parser.parse_args().plot)
