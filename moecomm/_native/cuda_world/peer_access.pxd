from libcpp.memory cimport shared_ptr

from moecomm._native cimport cudaapi


cdef class PeerAccess:
    cdef shared_ptr[cudaapi.PeerAccess] r
