from libcpp.memory cimport shared_ptr

from moecomm._native cimport capi
from moecomm._native.cpu_world.communicator cimport Communicator
from moecomm._native.shared.extents cimport Windows


cdef class Decode:
    cdef shared_ptr[capi.Decode] d
    cdef readonly Communicator comm
    cdef capi.Shape shape
    cdef Windows windows

    cdef shared_ptr[capi.Decode] borrow(self, str op) except *
    cdef object run_dispatch(self, const capi.DecodeDispatchCall& call)
    cdef object run_combine(self, const capi.DecodeCombineCall& call)
