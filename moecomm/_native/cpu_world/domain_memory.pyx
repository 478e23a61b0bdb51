# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The symmetric memory of a Domain as bytes."""
from cpython.buffer cimport PyBuffer_FillInfo


cdef class DomainMemory:
    """The memory for tensors of a Domain. It lives as long as a view of it."""

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.m.get().data() + self.begin, self.size, 0, flags)
