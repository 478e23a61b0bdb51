# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The symmetric memory of a Domain on a GPU as bytes."""
from libc.stdint cimport uintptr_t


cdef class DomainMemory:
    """The memory for tensors of a Domain. It lives as long as a view of it."""

    @property
    def __cuda_array_interface__(self):
        data = <uintptr_t>self.w.get().data() + self.begin
        return {"shape": (self.size,), "typestr": "|u1", "data": (data, False), "version": 3}
