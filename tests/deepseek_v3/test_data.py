"""Corpus, tokenizer and stream of examples/deepseek_v3: round trips, rates, complete data, any number of ranks."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.deepseek_v3.corpus import documents, fingerprint
from moecomm.errors import InvalidArgument

pytest.importorskip("tokenizers", reason="tokenizers is not installed: make examples")

from examples.deepseek_v3.stream import Stream, part_of
from examples.deepseek_v3.tokenizer import SPECIAL, Tokenizer, boundary_bias

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def texts():
    return documents(250_000)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(texts, 700)


def without(ids, tokenizer):
    """Return the texts between end tokens, with their holes filled."""
    found, begin = [], 0
    for end, i in enumerate(ids):
        if i != tokenizer.eos:
            continue
        part = ids[begin:end]
        if part and part[0] == tokenizer.fim_begin:
            hole, middle = part.index(tokenizer.fim_hole), part.index(tokenizer.fim_end)
            part = part[1:hole] + part[middle + 1 :] + part[hole + 1 : middle]
        found.append(tokenizer.decode(part))
        begin = end + 1
    return found, ids[begin:]


def test_texts(texts):
    """Texts are distinct, reproducible, and about as large as requested. Without texts, the error names folders."""
    assert len(set(texts)) == len(texts) > 20
    assert 250_000 <= sum(len(t.encode()) for t in texts) < 400_000
    assert fingerprint(texts) != fingerprint(texts[1:]) and len(fingerprint(texts)) == 16
    with pytest.raises(InvalidArgument, match="folders is"):
        documents(folders=[ROOT / "docs" / "no-such-folder"])


def test_round_trips(tokenizer, texts, tmp_path):
    """Any text survives a round trip, with and without the random split, and with a saved tokenizer."""
    odd = [
        "",
        "\n",
        "a:\n\nb",
        "naïve — 東京 🙂\r\n",
        "<|eos_token|> is text",
        "\x00\t ;\n",
        "x = {\n}\n" * 3,
    ]
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    for text in [*odd, *texts[:20]]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and again.encode(text) == ids
        assert tokenizer.eos not in ids
        assert tokenizer.decode(tokenizer.encode(text, 0.5, random.Random(0))) == text
    assert again.vocab_size == tokenizer.vocab_size == 700 and again.joined == tokenizer.joined
    assert [tokenizer.backend.token_to_id(s) for s in SPECIAL] == [0, 1, 2, 3]
    assert sum(map(len, texts)) / sum(len(tokenizer.encode(t)) for t in texts) > 2, "it does not compress"


def test_joined_tokens_are_split_at_the_given_rate(tokenizer, texts):
    assert len(tokenizer.joined) > 5
    for i, (sign, breaks) in tokenizer.joined.items():
        assert tokenizer.decode([i]) == tokenizer.decode(sign) + tokenizer.decode(breaks)
        assert not set(sign + breaks) & set(tokenizer.joined)
    before = sum(i in tokenizer.joined for t in texts for i in tokenizer.encode(t))
    chance = random.Random(1)
    after = sum(i in tokenizer.joined for t in texts for i in tokenizer.encode(t, 0.3, chance))
    assert before > 2000 and abs((before - after) / before - 0.3) < 0.03


def test_boundary_bias(tokenizer, texts):
    """Without the split, line breaks never follow a sign that is a token; with it they do."""
    in_text, without_split = boundary_bias(tokenizer, texts, 0.0)
    _, with_split = boundary_bias(tokenizer, texts, 0.3)
    assert in_text > 0.2 and without_split < 0.1 * in_text
    expected = (
        0.3 * in_text / (0.3 * in_text + 1 - in_text)
    )  # the other signs with line breaks stay one token
    assert 0.5 < with_split / expected < 1.5


@pytest.mark.parametrize("fim", [0.0, 0.1, 1.0])
def test_every_document_once(tokenizer, texts, fim):
    """An epoch has each text once, whole, in another order than the next epoch; holes have the given rate."""
    texts = texts[:: 1 if fim == 0.1 else 3]
    stream = Stream(texts, tokenizer, 7, fim=fim)
    ids = []
    while stream.state()["epoch"] < 2:
        ids += stream.take(3, 700).flatten().tolist()
    found, rest = without(ids, tokenizer)
    count = len(texts)
    assert sorted(found[:count]) == sorted(texts) == sorted(found[count : 2 * count])
    assert found[:count] != found[count : 2 * count]
    holes = sum(i == tokenizer.fim_begin for i in ids) / (len(found) + bool(rest))
    assert abs(holes - fim) < 0.08, holes
    assert Stream(texts, tokenizer, 8, fim=fim).take(3, 700).flatten().tolist() != ids[:2100]


def test_resumed_and_spread_over_ranks(tokenizer, texts):
    """A stream resumes at any point, also with other sequence lengths; the parts of all ranks form the batch."""
    whole, other = Stream(texts, tokenizer, 3), Stream(texts, tokenizer, 3)
    for count, length in ((5, 256), (1, 4001), (0, 9), (7, 64)):
        batch = whole.take(count, length)
        assert torch.equal(batch, other.take(count, length)) and batch.shape == (count, length)
        state = json.loads(json.dumps(other.state()))
        other = Stream(texts, tokenizer, 3)
        other.resume(state)
        for ranks in (1, 2, 4, 8):
            assert torch.equal(torch.cat([part_of(batch, r, ranks) for r in range(ranks)]), batch)
    with pytest.raises(InvalidArgument, match="seed is 3; expected 4"):
        Stream(texts, tokenizer, 4).resume(whole.state())


def test_the_same_in_another_process(tokenizer, texts, tmp_path):
    """The result does not depend on Python's hashes."""
    tokenizer.save(tmp_path / "tokenizer.json")
    code = (
        "import sys; from examples.deepseek_v3.corpus import documents, fingerprint;"
        "from examples.deepseek_v3.stream import Stream; from examples.deepseek_v3.tokenizer import Tokenizer;"
        "t = documents(250_000); k = Tokenizer.load(sys.argv[1]);"
        "print(fingerprint(t), Stream(t, k, 3).take(4, 99).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    want = f"{fingerprint(texts)} {Stream(texts, tokenizer, 3).take(4, 99).tolist()}"
    assert done.stdout.strip() == want, done.stderr[-2000:]
