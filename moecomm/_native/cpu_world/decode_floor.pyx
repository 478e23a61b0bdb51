# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""A lower bound of the time of a decode step, for benchmarks."""
from libc.stdint cimport uintptr_t
from libcpp.memory cimport shared_ptr

from moecomm._native cimport capi
from moecomm._native.cpu_world.decode cimport Decode
from moecomm._native.shared.status cimport failure_of


cdef class DecodeFloor:
    """The bytes and flags of a decode step, and nothing else."""
    cdef Decode decode
    cdef shared_ptr[capi.DecodeFloor] f
    cdef object keep

    def __cinit__(self, Decode decode, x, y):
        self.decode, self.keep = decode, (x, y)
        cdef uintptr_t at = x.data_ptr(), to = y.data_ptr()
        self.f = shared_ptr[capi.DecodeFloor](
            new capi.DecodeFloor(decode.d.get()[0], <const char*>at, <char*>to)
        )

    def run(self, int steps):
        """Return None or a Failure."""
        cdef capi.Status s
        self.decode.borrow("decode_floor")
        with nogil:
            s = self.f.get().run(steps)
        self.decode.comm.left()
        return failure_of(s)

    def latency(self, int rounds):
        """Return None or a Failure."""
        cdef capi.Status s
        self.decode.borrow("decode_floor")
        with nogil:
            s = self.f.get().latency(rounds)
        self.decode.comm.left()
        return failure_of(s)
