# Declarations of the arguments of a Domain's calls, in every world, for Cython.
from libc.stdint cimport int32_t, int64_t, uint64_t
from libcpp.vector cimport vector

from moecomm._native.capi cimport DType

cdef extern from "base/domain_layout.hpp" namespace "moecomm" nogil:
    cdef cppclass DomainShape:
        uint64_t heap_bytes
        int32_t counters
        int32_t channels

cdef extern from "protocol/verbs_views.hpp" namespace "moecomm" nogil:
    cdef cppclass Segment:
        uint64_t there
        char* here
        uint64_t bytes

    cdef cppclass Segments:
        const Segment* segment
        int64_t count

cdef extern from "runtime/domain.hpp" namespace "moecomm" nogil:
    int kMaxContributors

    cdef cppclass Rows:
        uint64_t there
        char* here
        uint64_t bytes
        int64_t count
        int64_t there_stride
        int64_t here_stride
        const int64_t* there_index
        const int64_t* here_index

    cdef cppclass GroupCall:
        int32_t root
        vector[int32_t] ranks
        vector[Rows] rows
        DType type
