from libcpp.memory cimport unique_ptr

from moecomm._native cimport capi


cdef class ReplicaPolicy:
    cdef unique_ptr[capi.ReplicaPolicy] c
