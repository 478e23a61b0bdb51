"""Stream of training sequences: documents in random order, packed without padding, some as fill-in-the-middle.

A sequence may contain several documents, and attention crosses their boundaries. A document that does not fit
continues in the next sequence. The stream is a pure function of texts, tokenizer and seed, and does not depend on the
number of ranks: each rank makes the whole stream and takes its part. Source: technical report, section 4.1.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from moecomm.errors import InvalidArgument

from .tokenizer import Tokenizer


class Stream:
    """A stream of sequences of any length.

    Parameters
    ----------
    texts : list of str
    tokenizer : Tokenizer
    seed : int
    fim : float
        Share of documents as fill-in-the-middle.
    split : float
        As for Tokenizer.encode.
    """

    def __init__(
        self, texts: list[str], tokenizer: Tokenizer, seed: int, *, fim: float = 0.1, split: float = 0.1
    ) -> None:
        self.texts, self.tokenizer, self.seed, self.fim, self.split = texts, tokenizer, seed, fim, split
        self._epoch, self._next = 0, 0
        self._rest: list[int] = []
        self._order = self._shuffled(0)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.texts)))
        random.Random(f"{self.seed}/{epoch}/order").shuffle(order)
        return order

    def document(self, epoch: int, index: int) -> list[int]:
        """Tokens of a text in an epoch, including the end token."""
        chance = random.Random(f"{self.seed}/{epoch}/{index}")
        text, t = self.texts[index], self.tokenizer
        if len(text) < 2 or chance.random() >= self.fim:
            return [*t.encode(text, self.split, chance), t.eos]
        # Prefix, suffix and middle are split at characters, so that each part is valid text.
        a, b = sorted(chance.sample(range(len(text) + 1), 2))
        prefix, middle, suffix = (t.encode(p, self.split, chance) for p in (text[:a], text[a:b], text[b:]))
        return [t.fim_begin, *prefix, t.fim_hole, *suffix, t.fim_end, *middle, t.eos]

    def take(self, count: int, length: int) -> torch.Tensor:
        """Return the next sequences, int64 [count, length]. The length may differ between calls."""
        while len(self._rest) < count * length:
            if self._next == len(self._order):
                self._epoch, self._next = self._epoch + 1, 0
                self._order = self._shuffled(self._epoch)
            self._rest += self.document(self._epoch, self._order[self._next])
            self._next += 1
        taken, self._rest = self._rest[: count * length], self._rest[count * length :]
        return torch.tensor(taken, dtype=torch.int64).view(count, length)

    def state(self) -> dict[str, Any]:
        """Return the position, in types that JSON supports."""
        return {
            "seed": self.seed,
            "texts": len(self.texts),
            "epoch": self._epoch,
            "next": self._next,
            "rest": self._rest,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Continue at the position of another stream of the same texts.

        Raises
        ------
        InvalidArgument
            The state is of another number of texts or another seed.
        """
        for name, own in (("seed", self.seed), ("texts", len(self.texts))):
            if state[name] != own:
                raise InvalidArgument(
                    f"state: {name} is {state[name]}; expected {own} as in this stream", op="Stream.resume"
                )
        self._epoch, self._next, self._rest = state["epoch"], state["next"], list(state["rest"])
        self._order = self._shuffled(self._epoch)


def part_of(batch: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Sequences of one rank in a batch. Parts differ by at most one sequence and may be empty."""
    return batch.tensor_split(ranks)[rank]
