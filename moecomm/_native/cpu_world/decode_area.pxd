from libc.stdint cimport int64_t
from libcpp.memory cimport shared_ptr

from moecomm._native cimport capi


cdef class DecodeArea:
    cdef shared_ptr[capi.Decode] owner
    cdef char* data
    cdef int64_t size
