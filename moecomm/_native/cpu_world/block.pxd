from libcpp.memory cimport shared_ptr

from moecomm._native cimport capi


cdef class Block:
    cdef shared_ptr[capi.Block] b
