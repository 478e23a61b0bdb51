# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Measures the rates at which this machine writes and reads memory."""
from libc.stdint cimport int64_t, uint64_t
from libcpp.memory cimport unique_ptr

from moecomm._native cimport capi


cdef class RateProbe:
    """Passes over memory like that of a window. write() streams stores, and read() loads every byte."""
    cdef unique_ptr[capi.RateProbe] p

    def __cinit__(self, int64_t size):
        self.p.reset(new capi.RateProbe(size))

    @property
    def nbytes(self):
        return self.p.get().bytes()

    def write(self):
        with nogil:
            self.p.get().write()

    def read(self):
        cdef uint64_t r
        with nogil:
            r = self.p.get().read()
        return r
