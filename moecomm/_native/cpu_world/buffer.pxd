from libcpp.memory cimport shared_ptr

from moecomm._native cimport capi
from moecomm._native.cpu_world.communicator cimport Communicator
from moecomm._native.shared.extents cimport Windows


cdef class Buffer:
    cdef object __weakref__
    cdef shared_ptr[capi.Buffer] b
    cdef readonly Communicator comm
    cdef capi.Shape shape
    cdef Windows windows

    cdef shared_ptr[capi.Buffer] borrow(self, str op) except *
