"""Byte-level BPE tokenizer. Some tokens combine punctuation and line breaks; they are split at random in training.

Needs the package `tokenizers`.
Source: technical report, section 4.1 (tokenizer, token boundary bias).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

EOS, FIM_BEGIN, FIM_HOLE, FIM_END = "<|eos_token|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"
SPECIAL = (EOS, FIM_BEGIN, FIM_HOLE, FIM_END)
# Pieces that BPE never combines: up to three digits; letters, with one space or sign before them; punctuation, with
# the line breaks after it; line breaks; spaces.
PIECES = r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
JOINED = re.compile(r"( ?\S+)([\r\n]+)")


class Tokenizer:
    """Converts text to ids and back.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        As made by train.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        backend.encode_special_tokens = True  # names of special tokens in a text are encoded as text
        self.eos, self.fim_begin, self.fim_hole, self.fim_end = map(backend.token_to_id, SPECIAL)
        # {id: (ids of the punctuation, ids of the line breaks)}
        self.joined: dict[int, tuple[list[int], list[int]]] = {}
        for i in range(self.vocab_size):
            match = JOINED.fullmatch(self.decode([i]))
            if match and "\ufffd" not in match[1]:  # skip tokens with a partial character
                self.joined[i] = self.encode(match[1]), self.encode(match[2])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a tokenizer on these texts. Deterministic."""
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a tokenizer that save has written."""
        return cls(Backend.from_file(str(path)))

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON."""
        self.backend.save(str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, split: float = 0.0, chance: random.Random | None = None) -> list[int]:
        """Encode a text. Names of special tokens are encoded as text.

        Parameters
        ----------
        text : str
        split : float
            Probability that a token of punctuation and line breaks is replaced by the tokens of its parts.
        chance : random.Random, optional
            Random source for split.
        """
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if not split or chance is None:
            return ids
        out: list[int] = []
        for i in ids:
            if i in self.joined and chance.random() < split:
                for part_ids in self.joined[i]:
                    out += part_ids
            else:
                out.append(i)
        return out

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids. Special tokens become their names; invalid UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


def boundary_bias(
    tokenizer: Tokenizer, texts: Iterable[str], split: float, seed: int = 0
) -> tuple[float, float]:
    """Share of punctuation that is followed by line breaks: (in the texts, in the training tokens).

    Only punctuation that some token combines with line breaks is counted. A prompt that ends with such a sign has the
    token of the sign alone. Without the random split, the model learns that line breaks hardly ever follow that
    token.
    """
    signs = {tuple(first) for first, _ in tokenizer.joined.values() if len(first) == 1}
    alone = {first[0]: tokenizer.decode(first) for first in signs}
    text_signs = text_breaks = token_signs = token_breaks = 0
    chance = random.Random(seed)
    for text in texts:
        for _, (first, last) in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text):
            piece = text[first:last]  # "):" is not the sign ":"
            sign = piece.rstrip("\r\n")
            if sign in alone.values():
                text_signs += 1
                text_breaks += piece != sign
        ids = tokenizer.encode(text, split, chance)
        for this, following in pairwise(ids):
            if this in alone:
                token_signs += 1
                token_breaks += tokenizer.decode([following]).startswith(("\n", "\r"))
    return text_breaks / max(text_signs, 1), token_breaks / max(token_signs, 1)
