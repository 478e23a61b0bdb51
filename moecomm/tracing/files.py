"""The files of a recording: made by nobody else, followed through no link, readable by their owner alone.

A recording's folder may be one that others can write to, and the names of its files are known in advance. So every file is made
with O_EXCL and O_NOFOLLOW, relative to a folder that was opened once; only segments of earlier recordings are ever removed, and
a foreign file under a segment's name is refused before anything is written.
"""

from __future__ import annotations

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
_HEAD = 1024  # bytes of a segment that show whose it is
_MEMBER = b"header.npy"  # the first one of the archive ...
_TEXT = '{"format"'.encode("utf-32-le")  # ... and how its text begins


class Folder:
    """A recording's folder as one rank writes to it. Files are made in it even where its path means another one by now."""

    def __init__(self, path, rank, size):
        self.path, self._rank, self._size = path, rank, size
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self):
        """Twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def earlier(self):
        """Names of what this rank removes before it writes: segments of an earlier recording, whole or not.

        Raises
        ------
        InvalidArgument
            There is a file of such a name that no recording has written.
        """
        found = []
        for name in sorted(os.listdir(self._fd)):
            match = SEGMENT.fullmatch(name) or _PARTIAL.fullmatch(name)
            if match is None or int(match[1]) % self._size != self._rank:
                continue
            if not self._is_ours(name):
                raise InvalidArgument(
                    f"Buffer: record is {str(self.path)!r}, which holds {name!r}, and no recording of yours has written that; expected an "
                    "empty folder, or one with an earlier recording, which is replaced",
                    op="Buffer",
                    rank=self._rank,
                )
            found.append(name)
        return found

    def remove(self, names):
        """Remove files of `earlier`."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)

    def try_to_write(self):
        """Make a file and remove it. Raises OSError."""
        name, file = self._make(0)
        file.close()
        os.unlink(name, dir_fd=self._fd)

    def write(self, number, save):
        """save(file) as segment `number`, or the next one that is free: a reader sees whole segments only. Returns the number.

        Raises
        ------
        OSError
            Of the first thing that fails; the unfinished file is gone.
        """
        partial, file = self._make(number)
        try:
            with file:
                save(file)
            for free in range(number, 10**9):
                with contextlib.suppress(FileExistsError):
                    self._publish(partial, f"rank-{self._rank:05d}.{free:03d}.npz")
                    return free
            raise FileExistsError("every segment's name is taken")
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=self._fd)

    def _make(self, number):
        name = f"rank-{self._rank:05d}.{number:03d}.{secrets.token_hex(8)}.partial"
        fd = os.open(
            name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd
        )
        return name, os.fdopen(fd, "wb")

    def _publish(self, partial, name):
        try:
            os.link(
                partial, name, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False
            )  # never over another file
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if name in os.listdir(self._fd):
                raise FileExistsError(name) from None
            os.rename(partial, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def _is_ours(self, name):
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError:  # a link, a socket, or nothing that this user may read
            return False
        try:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
                return False
            head = os.read(fd, _HEAD)
        finally:
            os.close(fd)
        empty = not head and name.endswith(".partial")  # killed before the first byte
        return empty or (head[:2] == b"PK" and _MEMBER in head[:64] and _TEXT in head)


def open_folder(path, rank, size):
    """The Folder of a recording, made where it is missing; nothing in it is changed.

    Raises
    ------
    InvalidArgument
        It cannot be made or written to, or holds what a recording would have to replace and has not written.
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
            f"Buffer: record is {path!r}; expected a folder that can be written ({error})",
            op="Buffer",
            rank=rank,
        )
    except InvalidArgument as error:
        why = error
    if folder is not None:
        folder.close()
    raise why
