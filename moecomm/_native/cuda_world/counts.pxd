from libc.stdint cimport int64_t
from libcpp.memory cimport shared_ptr

from moecomm._native cimport capi, cudaapi


cdef class Counts:
    cdef shared_ptr[cudaapi.DevicePlan] p
    cdef object owner
    cdef int64_t* data
    cdef int n


cdef Counts counts_of_plan(const shared_ptr[cudaapi.DevicePlan]& plan, int64_t* data, int n)
cdef Counts counts_of_traffic(owner, const capi.Counters* counters)
