# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Numbers in the memory of a GPU."""
from libc.stdint cimport int64_t, uintptr_t
from libcpp.memory cimport shared_ptr

from moecomm._native cimport capi, cudaapi


cdef class Counts:
    """int64 numbers in device memory: counts of a plan, or counters of traffic."""

    @property
    def __cuda_array_interface__(self):
        return {"shape": (self.n,), "typestr": "<i8", "data": (<uintptr_t>self.data, False), "version": 3}


cdef Counts counts_of_plan(const shared_ptr[cudaapi.DevicePlan]& plan, int64_t* data, int n):
    """Return n numbers of a plan. They keep the plan alive."""
    cdef Counts c = Counts.__new__(Counts)
    c.p = plan
    c.data = data
    c.n = n
    return c


cdef Counts counts_of_traffic(owner, const capi.Counters* counters):
    """Return counters of traffic in the order of capi.Counters. They keep the owner alive."""
    cdef Counts c = Counts.__new__(Counts)
    c.owner = owner
    c.data = <int64_t*>counters
    c.n = sizeof(capi.Counters) // 8
    return c
