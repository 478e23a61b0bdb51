from libcpp.memory cimport shared_ptr

from moecomm._native cimport cudaapi


cdef class Reach:
    cdef shared_ptr[cudaapi.DeviceReach] r
