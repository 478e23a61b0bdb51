# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The statuses of native calls as Python objects, for every world."""
from moecomm._native cimport capi

# In the order of capi.Code and capi.Phase.
CODES = (
    "ok", "invalid", "timeout", "lost", "capacity", "mismatch", "corrupt", "interrupted", "refused", "out_of_step",
)
PHASES = ("none", "announce", "counts", "send", "forward", "arrive", "publish", "reduce", "sum", "done", "flush")


cdef class Failure:
    pass


cdef object failure_of(const capi.Status& s):
    """Return the Failure of a status, or None if it is ok."""
    if s.code == capi.Code.ok:
        return None
    cdef Failure f = Failure.__new__(Failure)
    f.code = name_of_code(s.code)
    f.phase = name_of_phase(s.phase)
    f.peer = s.peer
    f.detail = s.detail
    f.expected = s.expected
    f.got = s.got
    f.reporter = s.reporter
    return f


cdef capi.Status status_of(Failure failure) except *:
    cdef capi.Status s
    s.code = <capi.Code><int>CODES.index(failure.code)
    s.phase = phase_of(failure.phase)
    s.peer, s.detail, s.reporter = failure.peer, failure.detail, failure.reporter
    s.expected, s.got = failure.expected, failure.got
    return s


cdef str name_of_code(capi.Code code):
    return CODES[<int>code]


cdef str name_of_phase(capi.Phase phase):
    return PHASES[<int>phase]


cdef capi.Phase phase_of(str name) except *:
    return <capi.Phase><int>PHASES.index(name)
