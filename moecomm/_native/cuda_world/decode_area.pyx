# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Memory of the decode path on a GPU as bytes."""
from libc.stdint cimport uintptr_t


cdef class DecodeArea:
    """Memory of a Decode that tensors view. It keeps the native memory, not the Python object, as in the cpu world."""

    @property
    def __cuda_array_interface__(self):
        return {"shape": (self.size,), "typestr": "|u1", "data": (<uintptr_t>self.data, False), "version": 3}
