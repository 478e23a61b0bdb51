from libc.stdint cimport int32_t, int64_t, uint32_t

from moecomm._native cimport capi
from moecomm._native.cpu_world.replica_policy cimport ReplicaPolicy


cdef class ReplicaRequest:
    cdef ReplicaPolicy policy
    cdef uint32_t routing
    cdef int64_t[:, ::1] slots
    cdef int32_t[::1] counted

    cdef void ask(self, capi.DispatchCall* call)
