"""Values of command-line options: each function is a `type` for argparse, which tells what is wrong and ends with status 2.

Files are looked at before the work begins: a result that nobody can write would come too late.
"""

from __future__ import annotations

import argparse
import math
import os
import stat
from collections.abc import Callable
from typing import NoReturn

MOST = (1 << 31) - 1


def _refuse(text: str, expected: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"got {text!r}; expected {expected}")


def _integer(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:  # also more digits than Python reads
        value = None
    if value is None or not low <= value <= high:
        _refuse(text, f"an int in {low}..{high}")
    return value


def positive(text: str) -> int:
    """An int >= 1."""
    return _integer(text, 1, MOST)


def count(text: str) -> int:
    """An int >= 0."""
    return _integer(text, 0, MOST)


def ranks(text: str) -> int:
    """A number of ranks."""
    return _integer(text, 1, 65535)


def tokens(text: str) -> int:
    """Tokens of a rank, at least one, as many as a Buffer may have."""
    return _integer(text, 1, 1 << 24)


def above_zero(text: str) -> float:
    """A finite number > 0."""
    value = _real(text)
    if not value > 0:
        _refuse(text, "a finite number > 0")
    return value


def share(text: str) -> float:
    """A number in 0..1."""
    value = _real(text)
    if not 0 <= value <= 1:
        _refuse(text, "a number in 0..1")
    return value


def _real(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    return value if math.isfinite(value) else math.nan


def positives(text: str) -> str:
    """Ints >= 1 with commas between them; the text itself."""
    for part in text.split(","):
        _integer(part, 1, 1 << 24)
    return text


def numbers(text: str) -> str:
    """Finite numbers > 0 with commas between them; the text itself."""
    for part in text.split(","):
        above_zero(part)
    return text


def geometries(text: str) -> str:
    """Nodes x ranks per node, with commas between them; the text itself."""
    for part in text.split(","):
        nodes, _, per_node = part.partition("x")
        ranks(nodes)
        ranks(per_node)
    return text


def some_of(*names: str) -> Callable[[str], str]:
    """A type: some of these names with commas between them; the text itself."""

    def check(text: str) -> str:
        for part in text.split(","):
            if part not in names:
                _refuse(part, f"some of {', '.join(names)}")
        return text

    return check


def file_to_write(text: str) -> str:
    """A file that is there and can be written, or can be made. It is not touched."""
    if text == "":
        return text  # none
    folder = os.path.dirname(text) or "."
    try:
        mode = os.stat(text).st_mode
    except FileNotFoundError:
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            _refuse(text, f"a file in a folder that is there and can be written, and {folder!r} is not")
    except (OSError, ValueError) as error:
        _refuse(text, f"a file that can be written ({error})")
    else:
        if stat.S_ISDIR(mode) or not os.access(text, os.W_OK):
            _refuse(text, "a file that can be written")
    return text


def folder_to_write(text: str) -> str:
    """A folder that is there and can be written, or can be made. It is not touched."""
    try:
        there = os.path.exists(text)
        at = text if there else os.path.dirname(os.path.abspath(text))
        while not os.path.exists(at):
            at = os.path.dirname(at)
        if not text or "\0" in text or not os.path.isdir(at) or not os.access(at, os.W_OK | os.X_OK):
            _refuse(text, "a folder that can be written or made")
    except ValueError as error:
        _refuse(text, f"a folder ({error})")
    return text


def file_to_read(text: str) -> str:
    """A regular file that can be read."""
    try:
        regular = stat.S_ISREG(os.stat(text).st_mode)
    except (OSError, ValueError) as error:
        _refuse(text, f"a file that can be read ({error})")
    if not regular or not os.access(text, os.R_OK):
        _refuse(text, "a regular file that can be read")
    return text


def source(*names: str) -> Callable[[str], str]:
    """A type: one of these names, or a file or folder that can be read."""

    def check(text: str) -> str:
        if text not in names:
            try:
                mode = os.stat(text).st_mode
            except (OSError, ValueError):
                _refuse(text, f"{', '.join(names)}, or a file or folder that can be read")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or not os.access(text, os.R_OK):
                _refuse(text, f"{', '.join(names)}, or a file or folder that can be read")
        return text

    return check
