from moecomm._native cimport capi


cdef class Failure:
    """A Status that is not ok, as Python sees it."""
    cdef readonly str code, phase
    cdef readonly int peer, detail
    cdef readonly int reporter   # the rank that reported the failure; -1: this rank found it
    cdef readonly object expected, got


cdef object failure_of(const capi.Status& s)
cdef capi.Status status_of(Failure failure) except *
cdef str name_of_code(capi.Code code)
cdef str name_of_phase(capi.Phase phase)
cdef capi.Phase phase_of(str name) except *
