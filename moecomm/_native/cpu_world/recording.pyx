# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The recording of the calls of a Buffer. moecomm.tracing writes it and documents its format."""
from libcpp.memory cimport make_shared

from moecomm._native cimport capi


cdef class Recording:
    """The recorded calls of a Buffer and its Decode, in memory."""

    def __cinit__(self, int top_k, int num_experts):
        self.r = make_shared[capi.Recording](top_k, num_experts)

    @property
    def nbytes(self):
        """Approximate size of the result of take() in bytes."""
        return self.r.get().bytes()
