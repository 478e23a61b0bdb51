"""Training text from this machine: sources and documentation of Python's library and of the installed packages."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moecomm.errors import InvalidArgument

SUFFIXES = (".py", ".md", ".rst", ".txt")


def documents(
    max_bytes: int = 2_000_000, folders: list[Path] | None = None, largest: int = 30_000
) -> list[str]:
    """Collect distinct texts. The choice is deterministic.

    Parameters
    ----------
    max_bytes, largest : int
        Approximate total size in bytes, and maximum number of characters of one text.
    folders : list of Path, optional
        Default: the folders of Python's library and of the installed packages.

    Raises
    ------
    InvalidArgument
        The folders contain no text.
    """
    if folders is None:
        folders = [Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib")]
    chosen: dict[bytes, str] = {}
    size = 0
    # The order by digest makes the texts a sample of all folders.
    for path in sorted(_paths(folders), key=lambda p: _digest(p.name + p.parent.name)):
        if size >= max_bytes:
            break
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = _digest(text)
        if 200 <= len(text) <= largest and digest not in chosen:
            chosen[digest] = text
            size += len(text.encode())
    if not chosen:
        raise InvalidArgument(
            f"folders is {[str(f) for f in folders]}; expected folders with {', '.join(SUFFIXES)} files",
            op="documents",
        )
    return list(chosen.values())


def _paths(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        for parent, _, names in os.walk(folder):
            yield from (Path(parent, name) for name in names if name.endswith(SUFFIXES))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def fingerprint(texts: list[str]) -> str:
    """A digest of the texts, in this order, with 16 hexadecimal digits. Ranks compare their data with it."""
    whole = hashlib.blake2b(digest_size=8)
    for text in texts:
        whole.update(len(text).to_bytes(8, "little") + text.encode())
    return whole.hexdigest()
