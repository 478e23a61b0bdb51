from libc.stdint cimport uint64_t
from libcpp.memory cimport shared_ptr

from moecomm._native cimport cudaapi


cdef class DomainMemory:
    cdef shared_ptr[cudaapi.DeviceWindow] w
    cdef uint64_t begin, size
