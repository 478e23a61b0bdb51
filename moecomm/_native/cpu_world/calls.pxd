from moecomm._native cimport capi

cdef int enter(capi.Communicator* comm, str op) except -1
cdef int refuse_closed(str op, str what) except -1
