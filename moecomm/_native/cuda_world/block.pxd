from libcpp.memory cimport shared_ptr

from moecomm._native cimport cudaapi


cdef class Block:
    cdef shared_ptr[cudaapi.DeviceBlock] b
