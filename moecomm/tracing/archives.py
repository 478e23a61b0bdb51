"""NumPy archives from anywhere: read into memory only where they are what they say, never as pickles, never larger than the file.

np.load believes a file's header: one that claims 2**60 elements ends in a MemoryError, other damage in one of a dozen exceptions.
Here every failure is an InvalidArgument that names the file and the array in it.
"""

from __future__ import annotations

import io
import os
import stat
import zipfile

import numpy as np

from ..checks import spelled
from ..errors import InvalidArgument

_MOST_BYTES = 1 << 40


def refuse(op, file, field, got, expected):
    """Raise InvalidArgument about a field of a file.

    Raises
    ------
    InvalidArgument
    """
    raise InvalidArgument(f"{op}: {str(file)!r}: {field} {got}; expected {expected}", op=op)


def read_archive(op, file, names, optional=()):
    """{name: array} of an .npz as np.savez writes it: the arrays `names`, and those of `optional` that are there.

    Raises
    ------
    InvalidArgument
        There is no such file, or it is damaged, compressed or holds other arrays.
    """
    with _opened(op, file) as opened:
        size = os.fstat(opened.fileno()).st_size
        try:
            archive = zipfile.ZipFile(opened)
            found = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        except Exception as error:  # zipfile promises BadZipFile, and raises more than that
            refuse(
                op, file, "archive", f"cannot be read ({type(error).__name__}: {error})", "an .npz archive"
            )
        if not set(names) <= set(found) <= {*names, *optional} or len(found) != len(archive.infolist()):
            refuse(op, file, "archive", f"holds {spelled(sorted(found))}", f"the arrays {', '.join(names)}")
        arrays = {}
        for name, member in found.items():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                refuse(
                    op,
                    file,
                    name,
                    f"says it has {member.file_size} bytes in a file of {size}",
                    "an uncompressed archive, as np.savez writes it",
                )
            try:
                raw = archive.read(member)  # its checksum is verified
            except Exception as error:  # as above
                refuse(
                    op, file, name, f"cannot be read ({type(error).__name__}: {error})", "an undamaged array"
                )
            arrays[name] = _array(op, file, name, raw)
        return arrays


def read_array(op, file):
    """The array of an .npy file.

    Raises
    ------
    InvalidArgument
        There is no such file, or it holds something else.
    """
    with _opened(op, file) as opened:
        return _array(op, file, "array", opened.read())


def read_text(op, file):
    """The text of a file, UTF-8; what is not becomes a replacement character.

    Raises
    ------
    InvalidArgument
        There is no such file, or it cannot be read.
    """
    with _opened(op, file) as opened:
        return opened.read().decode(errors="replace")


def _opened(op, file):
    """A regular file, opened to be read: a pipe or a device would never end."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError, TypeError) as error:
        refuse(op, file, "file", f"cannot be opened ({error})", "a file that can be read")
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_size > _MOST_BYTES:
        os.close(fd)
        refuse(op, file, "file", "is a folder, a pipe, a device or too large", "a regular file")
    return os.fdopen(fd, "rb")


def _array(op, file, name, raw):
    data = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(data)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, fortran, dtype = read(data)
    except Exception as error:  # whatever a damaged header makes of NumPy's parser
        refuse(
            op,
            file,
            name,
            f"has no header of an array ({type(error).__name__}: {error})",
            "an array in NumPy's format",
        )
    start = data.tell()
    count = 1
    for n in shape:  # Python's integers: nothing overflows
        count *= n
    if dtype.hasobject or min(shape, default=0) < 0 or count * dtype.itemsize != len(raw) - start:
        refuse(
            op,
            file,
            name,
            f"says it is {dtype} {list(shape)}, with {len(raw) - start} bytes",
            "as many bytes as its shape takes, and no objects",
        )
    return np.frombuffer(raw, dtype, count, start).reshape(shape, order="F" if fortran else "C").copy()
