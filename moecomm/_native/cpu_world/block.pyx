# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Block: one piece of the arena, the memory of one result."""
cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int64_t, uint64_t, uintptr_t

from moecomm._native.shared.tensors cimport can_make, make_tensor


@cython.freelist(8)
cdef class Block:
    """The memory of one result. Tensors view it, and it is freed with the last of them."""

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.b.get().data(), self.b.get().bytes(), 0, flags)

    @property
    def nbytes(self):
        return self.b.get().bytes()

    @property
    def address(self):
        return <uintptr_t>self.b.get().data()

    def tensor(self, uint64_t offset, int code, int bits, int64_t rows, int64_t columns):
        """Make a tensor [rows, columns], or [rows] if columns is 0, with a type code of DLPack; else None."""
        if not can_make():
            return None
        return make_tensor(self, self.b.get().data() + offset, code, bits, rows, columns, NULL)
