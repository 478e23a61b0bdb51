from libc.stdint cimport int32_t, int64_t, uint32_t

from moecomm._native cimport capi
from moecomm._native.cpu_world.choice cimport Choice


cdef class Chosen:
    cdef Choice choice
    cdef uint32_t routing
    cdef int64_t[:, ::1] slots
    cdef int32_t[::1] counted

    cdef void ask(self, capi.DispatchCall* call)
