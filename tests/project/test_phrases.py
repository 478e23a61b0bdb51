"""tools/phrases.py finds banned phrases in comments, docstrings and documentation."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("phrases", ROOT / "tools" / "phrases.py")
phrases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(phrases)

BASIC = "It was in" + " vain."
STRICT = "No" + "body waits, and the rows are dealt" + " out."
EXPECTED = ["in" + " vain", "No" + "body", "dealt" + " out"]


def found(path, text):
    """Write a file; return its banned phrases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return [phrase for _, phrase, _ in phrases.hits(path)]


@pytest.mark.parametrize(
    "name",
    [
        "moecomm/nn/a.py",
        "moecomm/_native/a.pyx",
        "bench/a.py",
        "tests/nn/a.py",
        "docs/a.md",
        "csrc/base/a.hpp",
        "tools/ptx/a.py",
    ],
)
def test_strict_phrases_are_found(tmp_path, name):
    """All phrases are banned in Python, C++ and Markdown files."""
    assert found(tmp_path / name, f'"""{BASIC}"""\n# {STRICT}\n') == EXPECTED


def test_more_phrases_are_banned_in_cpp(tmp_path):
    """The phrases of CXX are banned in C++ only."""
    text = "// Who" + "ever waits is looked" + " at."
    assert found(tmp_path / "csrc" / "a.cpp", text) == ["Who" + "ever", "looked" + " at"]
    assert found(tmp_path / "a.py", text) == []


def test_plain_text_passes(tmp_path):
    """Ordinary sentences and names have no banned phrases."""
    assert found(tmp_path / "a.py", "rows = out.x  # the received rows, without padding\n") == []
