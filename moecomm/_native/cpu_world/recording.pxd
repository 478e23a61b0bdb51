from libcpp.memory cimport shared_ptr

from moecomm._native cimport capi


cdef class Recording:
    cdef shared_ptr[capi.Recording] r
