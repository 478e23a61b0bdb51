"""Safe reading of NumPy archives from untrusted sources: no pickles, and never more memory than the size of the file.

np.load trusts the header of a file: a header that claims 2**60 elements raises MemoryError, and other damage raises
one of a dozen exceptions. Here every failure is an InvalidArgument that names the file and the array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import io
import os
import stat
import zipfile

import numpy as np

from ..checks import spelled
from ..errors import InvalidArgument

_MOST_BYTES = 1 << 40


def refuse(op: str, file: Any, field: str, got: Any, expected: Any) -> None:
    """Raise InvalidArgument about a field of a file.

    Raises
    ------
    InvalidArgument
        Always.
    """
    raise InvalidArgument(f"{op}: {str(file)!r}: {field} {got}; expected {expected}", op=op)


def read_archive(op: str, file: Any, names: Sequence[str], optional: Any = ()) -> Any:
    """Read an .npz file as np.savez writes it: {name: array} of all `names`, and of those in `optional` that exist.

    Raises
    ------
    InvalidArgument
        The file does not exist, is damaged or compressed, or contains other arrays.
    """
    with _opened(op, file) as opened:
        size = os.fstat(opened.fileno()).st_size
        try:
            archive = zipfile.ZipFile(opened)
            found = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        except Exception as error:  # zipfile raises more than the documented BadZipFile
            refuse(
                op, file, "archive", f"cannot be read ({type(error).__name__}: {error})", "an .npz archive"
            )
        if not set(names) <= set(found) <= {*names, *optional} or len(found) != len(archive.infolist()):
            refuse(
                op, file, "archive", f"contains {spelled(sorted(found))}", f"the arrays {', '.join(names)}"
            )
        arrays = {}
        for name, member in found.items():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                refuse(
                    op,
                    file,
                    name,
                    f"claims {member.file_size} bytes in a file of {size}",
                    "an uncompressed archive, as np.savez writes it",
                )
            try:
                raw = archive.read(member)  # verifies the checksum
            except Exception as error:  # see above
                refuse(
                    op, file, name, f"cannot be read ({type(error).__name__}: {error})", "an undamaged array"
                )
            arrays[name] = _array(op, file, name, raw)
        return arrays


def read_array(op: str, file: Any) -> Any:
    """Read the array of an .npy file.

    Raises
    ------
    InvalidArgument
        The file does not exist or does not contain an array.
    """
    with _opened(op, file) as opened:
        return _array(op, file, "array", opened.read())


def read_text(op: str, file: Any) -> Any:
    """Read a text file in UTF-8. Invalid bytes become replacement characters.

    Raises
    ------
    InvalidArgument
        The file does not exist or cannot be read.
    """
    with _opened(op, file) as opened:
        return opened.read().decode(errors="replace")


def _opened(op: str, file: Any) -> Any:
    """Open a regular file for reading. Refuses pipes and devices, which might never end."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError, TypeError) as error:
        refuse(op, file, "file", f"cannot be opened ({error})", "a readable file")
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_size > _MOST_BYTES:
        os.close(fd)
        refuse(op, file, "file", "is a folder, a pipe, a device or too large", "a regular file")
    return os.fdopen(fd, "rb")


def _array(op: str, file: Any, name: str, raw: Any) -> Any:
    data = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(data)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, fortran, dtype = read(data)
    except Exception as error:  # NumPy's parser raises various exceptions for a damaged header
        refuse(
            op,
            file,
            name,
            f"has an invalid header ({type(error).__name__}: {error})",
            "an array in NumPy's format",
        )
    start = data.tell()
    count = 1
    for n in shape:  # Python integers do not overflow
        count *= n
    if dtype.hasobject or min(shape, default=0) < 0 or count * dtype.itemsize != len(raw) - start:
        refuse(
            op,
            file,
            name,
            f"claims to be {dtype} {list(shape)} but has {len(raw) - start} bytes",
            "the number of bytes of its shape, and no objects",
        )
    return np.frombuffer(raw, dtype, count, start).reshape(shape, order="F" if fortran else "C").copy()
