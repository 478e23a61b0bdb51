"""Batches: sequences of text, and a share of retrieval sequences, whose haystacks are text as well."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch

from .needle import Needles
from .stream import Stream, part_of
from .tokenizer import Tokenizer


class Batch(NamedTuple):
    """One batch of sequences.

    Attributes
    ----------
    ids : Tensor int64 [B, S]
    text, answers : Tensor bool [B, S]
        Tokens to predict as text, and as words of a secret.
    """

    ids: torch.Tensor
    text: torch.Tensor
    answers: torch.Tensor

    def part(self, rank: int, ranks: int) -> Batch:
        """Sequences of one rank."""
        return Batch(*(part_of(t, rank, ranks) for t in self))


class Mixture:
    """The sequence of batches of a run, a pure function of texts, tokenizer and seed.

    Parameters
    ----------
    texts, tokenizer, seed
        As for Stream.
    share : float
        Share of retrieval sequences, at equal intervals.
    """

    def __init__(self, texts: list[str], tokenizer: Tokenizer, seed: int, share: float = 0.5) -> None:
        self.seed, self.share, self.count = seed, share, 0
        self.needles = Needles.of(tokenizer) if share else None
        self.stream = Stream(texts, tokenizer, seed)
        self.haystacks = Stream(texts, tokenizer, seed + 1, fim=0.0)

    def take(self, count: int, length: int) -> Batch:
        """Return the next batch, with `count` sequences of `length` tokens."""
        numbers = range(self.count, self.count + count)
        self.count += count
        kinds = [int((n + 1) * self.share) > int(n * self.share) for n in numbers]
        text = self.stream.take(kinds.count(False), length)
        haystacks = self.haystacks.take(kinds.count(True), length)
        ids = torch.empty(count, length, dtype=torch.int64)
        is_text, is_answer = (torch.zeros(count, length, dtype=torch.bool) for _ in range(2))
        texts, hays = iter(text), iter(haystacks)
        for i, (number, hidden) in enumerate(zip(numbers, kinds, strict=True)):
            if hidden and self.needles is not None:
                chance = random.Random(f"{self.seed}/{number}/needle")
                ids[i], is_answer[i] = self.needles.hide(next(hays), chance)
            else:
                ids[i], is_text[i] = next(texts), True
        return Batch(ids, is_text, is_answer)

    def state(self) -> dict[str, Any]:
        """Return the position, in types that JSON supports."""
        return {"count": self.count, "stream": self.stream.state(), "haystacks": self.haystacks.state()}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue at the position of another Mixture."""
        self.count = state["count"]
        self.stream.resume(state["stream"])
        self.haystacks.resume(state["haystacks"])
