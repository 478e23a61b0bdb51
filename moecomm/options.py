"""Types of command-line options. Each function is a `type` for argparse, which reports errors and exits with status 2.

Files are checked before the work begins, so that no result is lost because it cannot be written.
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
    except ValueError:  # also raised for more digits than Python converts
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
    """A number of tokens per rank: at least 1, at most the limit of a Buffer."""
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
    """A comma-separated list of ints >= 1. Returns the text."""
    for part in text.split(","):
        _integer(part, 1, 1 << 24)
    return text


def numbers(text: str) -> str:
    """A comma-separated list of finite numbers > 0. Returns the text."""
    for part in text.split(","):
        above_zero(part)
    return text


def sizes(text: str) -> str:
    """A comma-separated list of multiples of 8 in 8..2^30. Returns the text."""
    for part in text.split(","):
        if _integer(part, 8, 1 << 30) % 8:
            _refuse(part, "a multiple of 8")
    return text


def geometries(text: str) -> str:
    """A comma-separated list of NODESxRANKS_PER_NODE. Returns the text."""
    for part in text.split(","):
        nodes, _, per_node = part.partition("x")
        ranks(nodes)
        ranks(per_node)
    return text


def some_of(*names: str) -> Callable[[str], str]:
    """Make a type: a comma-separated list of these names. It returns the text."""

    def check(text: str) -> str:
        for part in text.split(","):
            if part not in names:
                _refuse(part, f"some of {', '.join(names)}")
        return text

    return check


def file_to_write(text: str) -> str:
    """A file that can be written or made. The file is not changed."""
    if text == "":
        return text  # no file
    folder = os.path.dirname(text) or "."
    try:
        mode = os.stat(text).st_mode
    except FileNotFoundError:
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            _refuse(text, f"a file in an existing, writable folder ({folder!r} is not)")
    except (OSError, ValueError) as error:
        _refuse(text, f"a writable file ({error})")
    else:
        if stat.S_ISDIR(mode) or not os.access(text, os.W_OK):
            _refuse(text, "a writable file")
    return text


def folder_to_write(text: str) -> str:
    """A folder that can be written or made. The folder is not changed."""
    try:
        there = os.path.exists(text)
        at = text if there else os.path.dirname(os.path.abspath(text))
        while not os.path.exists(at):
            at = os.path.dirname(at)
        if not text or "\0" in text or not os.path.isdir(at) or not os.access(at, os.W_OK | os.X_OK):
            _refuse(text, "a writable folder, or one that can be made")
    except ValueError as error:
        _refuse(text, f"a folder ({error})")
    return text


def file_to_read(text: str) -> str:
    """A readable regular file."""
    try:
        regular = stat.S_ISREG(os.stat(text).st_mode)
    except (OSError, ValueError) as error:
        _refuse(text, f"a readable file ({error})")
    if not regular or not os.access(text, os.R_OK):
        _refuse(text, "a readable regular file")
    return text


def source(*names: str) -> Callable[[str], str]:
    """Make a type: one of these names, or a readable file or folder."""

    def check(text: str) -> str:
        if text not in names:
            try:
                mode = os.stat(text).st_mode
            except (OSError, ValueError):
                _refuse(text, f"{', '.join(names)}, or a readable file or folder")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or not os.access(text, os.R_OK):
                _refuse(text, f"{', '.join(names)}, or a readable file or folder")
        return text

    return check
