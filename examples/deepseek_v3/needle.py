"""Needle in a haystack: a text contains a secret of three words, and its end asks for them. Grid of length and depth.

A needle is a marker token and one word of each of three kinds. The text ends with the marker again, and the model
must predict the three words. The words of a needle occur nowhere else in the text. Source: technical report, section
4.3 (needle in a haystack).
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from moecomm.errors import InvalidArgument

from .ranks import sum_over_ranks

if TYPE_CHECKING:
    import moecomm

    from .model import Model
    from .tokenizer import Tokenizer

PLACES = 3  # number of words of a secret
SIZE = PLACES + 1


class Needles:
    """Makes retrieval sequences of any length.

    Parameters
    ----------
    marker, filler : int
        Id of the marker, and the id that replaces words of secrets in the haystack.
    kinds : Tensor [3, words] int64
        Ids of the words of each kind.
    """

    def __init__(self, marker: int, filler: int, kinds: torch.Tensor) -> None:
        self.marker, self.filler, self.kinds = marker, filler, kinds

    @classmethod
    def of(cls, tokenizer: Tokenizer, words: int = 8) -> Needles:
        """Make Needles with the rarest words that are a single token: a space and letters.

        Raises
        ------
        InvalidArgument
            The vocabulary has too few such words.
        """
        ids = [
            i
            for i in reversed(range(tokenizer.vocab_size))
            if re.fullmatch(r" [A-Za-z]{2,}", tokenizer.decode([i]))
        ]
        if len(ids) < PLACES * words + 1:
            raise InvalidArgument(
                f"words is {words}; expected a vocabulary with {PLACES * words + 1} whole words, got {len(ids)}; "
                "enlarge the vocabulary",
                op="Needles",
            )
        kinds = torch.tensor(ids[1 : PLACES * words + 1]).view(PLACES, words)
        return cls(ids[0], tokenizer.encode("\n")[0], kinds)

    def hide(
        self, haystack: torch.Tensor, chance: random.Random, depth: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hide a needle: return the sequence int64 [L], and bool [L] of the tokens that are the answer.

        Parameters
        ----------
        haystack : Tensor [L] int64
        chance : random.Random
            Draws the secret and, if depth is None, the depth.
        depth : float, optional
            Position of the needle: 0 is the beginning, 1 is directly before the question.

        Raises
        ------
        InvalidArgument
            The haystack is too short for a needle and the question.
        """
        length = len(haystack)
        if length < 2 * SIZE:
            raise InvalidArgument(
                f"haystack has {length} tokens; expected at least {2 * SIZE}", op="Needles.hide"
            )
        secret = [int(kind[chance.randrange(kind.numel())]) for kind in self.kinds]
        needle = torch.tensor([self.marker, *secret])
        reserved = torch.cat((self.kinds.flatten(), needle[:1]))
        ids = haystack.masked_fill(torch.isin(haystack, reserved), self.filler)
        begin = round((chance.random() if depth is None else depth) * (length - 2 * SIZE))
        ids[begin : begin + SIZE] = needle
        ids[length - SIZE :] = needle
        answers = torch.zeros(length, dtype=torch.bool)
        answers[length - PLACES :] = True
        return ids, answers


class Grid(NamedTuple):
    """Result of a measurement: found[i][j] is the share of complete secrets found at lengths[i] and depths[j]."""

    lengths: list[int]
    depths: list[float]
    found: list[list[float]]

    def at(self, longest: int) -> float:
        """Mean over depths at the largest length <= longest."""
        row = max(i for i, length in enumerate(self.lengths) if length <= longest)
        return sum(self.found[row]) / len(self.found[row])


@torch.no_grad()
def measure(
    model: Model,
    needles: Needles,
    text: torch.Tensor,
    lengths: list[int],
    depths: list[float],
    trials: int,
    comm: moecomm.Communicator | None = None,
) -> Grid:
    """Measure how many secrets the model finds in windows of a text. Collective: ranks share the trials.

    A secret is found if greedy decoding gives all its words: each word must have the highest logit after the correct
    previous words.

    Parameters
    ----------
    model : Model
    needles : Needles
    text : Tensor [n] int64
        At least as long as the largest length.
    lengths, depths : list
    trials : int
        Secrets per length and depth.
    comm : moecomm.Communicator, optional

    Raises
    ------
    InvalidArgument
        The text is too short.
    """
    if len(text) < max(lengths):
        raise InvalidArgument(
            f"text has {len(text)} tokens; expected at least {max(lengths)}, the largest length",
            op="measure",
        )
    rank, ranks = (0, 1) if comm is None else (comm.rank, comm.size)
    hits = torch.zeros(len(lengths), len(depths))
    for i, length in enumerate(lengths):
        for j, depth in enumerate(depths):
            for first in range(0, trials, ranks):
                chance = random.Random(f"{length}/{depth}/{first + rank}")
                begin = chance.randrange(len(text) - length + 1)
                ids, answers = needles.hide(text[begin : begin + length], chance, depth)
                mine = ids[None, :] if first + rank < trials else ids[None, :][:0]
                guessed = model(mine).logits[:, :-1].argmax(-1)[:, answers[1:]]
                hits[i, j] += (guessed == ids[answers]).all(-1).sum()
    if comm is not None:
        sum_over_ranks(comm, [hits])
    return Grid(lengths, depths, (hits / trials).tolist())


def plot(grids: dict[str, Grid], path: str | Path) -> None:
    """Write a PNG with one heat map per grid: red for 0% found, green for 100%."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(grids), figsize=(5 * len(grids), 4), squeeze=False)
    for axis, (name, grid) in zip(axes[0], grids.items(), strict=True):
        axis.imshow(torch.tensor(grid.found).T, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axis.set(title=name, xlabel="tokens", ylabel="depth of the needle")
        axis.set_xticks(range(len(grid.lengths)), [str(n) for n in grid.lengths])
        axis.set_yticks(range(len(grid.depths)), [f"{d:.0%}" for d in grid.depths])
        for i, row in enumerate(grid.found):
            for j, value in enumerate(row):
                axis.text(i, j, f"{value:.0%}", ha="center", va="center", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
