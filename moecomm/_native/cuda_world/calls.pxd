from libcpp.memory cimport shared_ptr

from moecomm._native cimport cudaapi


cdef class Calls:
    cdef shared_ptr[cudaapi.DeviceCalls] c
