from libcpp.memory cimport shared_ptr

from moecomm._native cimport capi


cdef class Communicator:
    cdef shared_ptr[capi.Communicator] c
    cdef list put_off   # work to run when the call that this thread is inside returns

    cdef int left(self) except -1
    cdef object do_put_off(self)
