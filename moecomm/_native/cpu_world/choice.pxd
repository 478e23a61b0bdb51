from libcpp.memory cimport unique_ptr

from moecomm._native cimport capi


cdef class Choice:
    cdef unique_ptr[capi.Choice] c
