from libc.stdint cimport int64_t
from libcpp.memory cimport shared_ptr

from moecomm._native cimport cudaapi


cdef class DecodeArea:
    cdef shared_ptr[cudaapi.DeviceDecode] owner
    cdef char* data
    cdef int64_t size
