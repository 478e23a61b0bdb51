# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Memory of the decode path as bytes."""
from cpython.buffer cimport PyBuffer_FillInfo


cdef class DecodeArea:
    """Memory of a Decode that tensors view. It keeps the native memory mapped.

    It does not refer to the Python object, which holds these tensors: the garbage collector could not find that cycle.
    """

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.size, 0, flags)
