"""docs/errors.md: every error has a section, and its texts equal the raised ones."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from moecomm import errors

TEXT = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
CLASSES = [
    name for name, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, (Exception, Warning))
]


def section(name):
    return TEXT.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_has_a_section(name):
    """Each section has the text, the cause and the remedy; the table has a line."""
    own = section(name)
    assert "\n    " in own and "**Cause.**" in own and "**What to do.**" in own
    assert name == "MoecommError" or f"[`{name}`](#{name.lower()})" in TEXT


def test_no_section_too_many():
    assert sorted(re.findall(r"^## (.*)$", TEXT, re.M)) == sorted(CLASSES)


@pytest.mark.parametrize(
    "code,op,phase,detail",
    [
        ("invalid", "dispatch", "none", 1),
        ("invalid", "dispatch", "none", 2),
        ("capacity", "dispatch", "counts", 1),
        ("capacity", "dispatch", "counts", 0),
        ("mismatch", "dispatch", "counts", 0),
        ("mismatch", "combine", "counts", 0),
        ("timeout", "dispatch", "counts", 0),
        ("lost", "dispatch", "counts", 0),
        ("corrupt", "dispatch", "arrive", 5),
        ("refused", "dispatch", "counts", 1),
        ("out_of_step", "dispatch", "counts", 0 | 2 << 4),
        ("out_of_step", "dispatch", "counts", 14 << 4),
        ("out_of_step", "combine", "publish", 2 | 13 << 4),
        ("out_of_step", "decode_dispatch", "arrive", 3 | 13 << 4),
    ],
)
def test_texts_are_the_real_ones(code, op, phase, detail):
    """The text of raise_failure, with N for numbers, is in the section of the error."""
    failure = SimpleNamespace(code=code, phase=phase, peer=1, expected=7, got=3, detail=detail, reporter=-1)
    with pytest.raises(errors.MoecommError) as raised:
        errors.raise_failure(failure, op=op, rank=0)
    assert any(
        same(line).startswith(same(str(raised.value)))
        for line in section(type(raised.value).__name__).splitlines()
    ), str(raised.value)


def test_the_text_of_a_rank_that_was_away_is_the_real_one():
    failure = SimpleNamespace(
        code="timeout", phase="counts", peer=0, expected=7, got=3, detail=4000, reporter=1
    )
    with pytest.raises(errors.PeerTimeout) as raised:
        errors.raise_failure(failure, op="dispatch", rank=0)
    assert same(str(raised.value)) in map(same, section("PeerTimeout").splitlines())


def same(text):
    """Replace the numbers of a text by N."""
    return re.sub(r"0x(N|[0-9a-f]+)|\d+", lambda m: "0xN" if m[0].startswith("0x") else "N", text.strip())
