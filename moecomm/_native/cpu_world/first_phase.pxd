from libcpp.memory cimport unique_ptr

from moecomm._native cimport capi
from moecomm._native.cpu_world.block cimport Block
from moecomm._native.cpu_world.plan cimport Plan


cdef class FirstPhase:
    cdef unique_ptr[capi.FirstPhase] f
    cdef public object make
    cdef tuple parts

    cdef capi.FirstPhase* begin(self, Plan plan, Block out, Block output)
