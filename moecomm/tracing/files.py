"""Creates the files of a recording safely: uses no file of another user, follows no link; only the owner can read.

The folder of a recording may be writable by others, and the names of its files are predictable. So every file is made
with O_EXCL and O_NOFOLLOW, relative to a folder that is opened once. Only segments of earlier recordings are removed.
A foreign file with the name of a segment is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path

from ..checks import path as checked_path
from ..errors import InvalidArgument

SEGMENT = re.compile(r"rank-(\d{5})\.(\d{3,9})\.npz")
_PARTIAL = re.compile(r"rank-(\d{5})\.(\d{3,9})\.([0-9a-f]{16}\.)?partial")
_HEAD = 1024  # bytes of a file that identify it as a segment
_MEMBER = b"header.npy"  # first member of the archive
_TEXT = '{"format"'.encode("utf-32-le")  # begin of that member's text


class Folder:
    """The folder of a recording, opened by one rank. It stays the same folder, even if its path changes meaning."""

    def __init__(self, path: Any, rank: Any, size: int) -> None:
        self.path, self._rank, self._size = path, rank, size
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the folder. May be called repeatedly."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def earlier(self) -> Any:
        """Names of the files that this rank must remove first: complete and partial segments of an earlier recording.

        Raises
        ------
        InvalidArgument
            A file has the name of a segment but was not written by a recording of this user.
        """
        found = []
        for name in sorted(os.listdir(self._fd)):
            match = SEGMENT.fullmatch(name) or _PARTIAL.fullmatch(name)
            if match is None or int(match[1]) % self._size != self._rank:
                continue
            if not self._is_ours(name):
                raise InvalidArgument(
                    f"Buffer: record is {str(self.path)!r}, which contains {name!r}, a file that no recording of this "
                    "user has written; expected an empty folder, or one with an earlier recording to replace",
                    op="Buffer",
                    rank=self._rank,
                )
            found.append(name)
        return found

    def remove(self, names: Sequence[str]) -> None:
        """Remove the files that `earlier` has returned."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)

    def try_to_write(self) -> None:
        """Make a file and remove it. Raises OSError if the folder cannot be written."""
        name, file = self._make(0)
        file.close()
        os.unlink(name, dir_fd=self._fd)

    def write(self, number: int, save: Any) -> Any:
        """Write a segment with save(file); return its number: `number`, or the next one that is free.

        Readers see complete segments only.

        Raises
        ------
        OSError
            The file cannot be written. The incomplete file has been removed.
        """
        partial, file = self._make(number)
        try:
            with file:
                save(file)
            for free in range(number, 10**9):
                with contextlib.suppress(FileExistsError):
                    self._publish(partial, f"rank-{self._rank:05d}.{free:03d}.npz")
                    return free
            raise FileExistsError("all names of segments are in use")
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=self._fd)

    def _make(self, number: int) -> Any:
        name = f"rank-{self._rank:05d}.{number:03d}.{secrets.token_hex(8)}.partial"
        fd = os.open(
            name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd
        )
        return name, os.fdopen(fd, "wb")

    def _publish(self, partial: Any, name: str) -> None:
        try:
            # Unlike rename, link never replaces a file.
            os.link(partial, name, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:  # the file system has no hard links
            if name in os.listdir(self._fd):
                raise FileExistsError(name) from None
            os.rename(partial, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def _is_ours(self, name: str) -> Any:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError:  # a link, a socket, or not readable for this user
            return False
        try:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
                return False
            head = os.read(fd, _HEAD)
        finally:
            os.close(fd)
        empty = not head and name.endswith(".partial")  # the process was killed before it wrote anything
        return empty or (head[:2] == b"PK" and _MEMBER in head[:64] and _TEXT in head)


def open_folder(path: Any, rank: Any, size: int) -> Any:
    """Open the Folder of a recording; make it if it does not exist. Changes no file.

    Raises
    ------
    InvalidArgument
        The folder cannot be made or written, or contains a foreign file with the name of a segment.
    """
    path, folder = checked_path("Buffer", "record", path), None
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).mkdir(mode=0o700, exist_ok=True)
        folder = Folder(path, rank, size)
        folder.earlier()
        folder.try_to_write()
        return folder
    except OSError as error:
        why = InvalidArgument(
            f"Buffer: record is {path!r}; expected a writable folder ({error})",
            op="Buffer",
            rank=rank,
        )
    except InvalidArgument as error:
        why = error
    if folder is not None:
        folder.close()
    raise why
