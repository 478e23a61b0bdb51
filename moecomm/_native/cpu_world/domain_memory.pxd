from libc.stdint cimport uint64_t
from libcpp.memory cimport shared_ptr

from moecomm._native cimport capi


cdef class DomainMemory:
    cdef shared_ptr[capi.Memory] m
    cdef uint64_t begin, size
