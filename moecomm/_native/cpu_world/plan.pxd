from libcpp.memory cimport shared_ptr

from moecomm._native cimport capi


cdef class Plan:
    cdef shared_ptr[capi.Plan] p
