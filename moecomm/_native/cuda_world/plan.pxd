from libcpp.memory cimport shared_ptr

from moecomm._native cimport cudaapi


cdef class Plan:
    cdef shared_ptr[cudaapi.DevicePlan] p
