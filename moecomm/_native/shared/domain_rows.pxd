# Converts the arguments of a Domain's calls from Python numbers to C++ structures, for every world.
from libc.stdint cimport int64_t, uintptr_t
from libcpp.vector cimport vector

from moecomm._native cimport capi, domainrows


cdef inline vector[domainrows.Rows] rows_of(list rows) except *:
    """Convert [(offset, address, bytes of a row, rows, remote stride, local stride, remote index, local index)].

    The indices are addresses; 0: none.
    """
    cdef vector[domainrows.Rows] out
    cdef domainrows.Rows r
    for there, here, size, count, there_stride, here_stride, there_index, here_index in rows:
        r.there = there
        r.here = <char*><uintptr_t>here
        r.bytes = size
        r.count = count
        r.there_stride = there_stride
        r.here_stride = here_stride
        r.there_index = <const int64_t*><uintptr_t>there_index
        r.here_index = <const int64_t*><uintptr_t>here_index
        out.push_back(r)
    return out


cdef inline vector[domainrows.GroupCall] group_calls_of(list calls) except *:
    """Convert [(root, ranks, rows, number of the dtype)]."""
    cdef vector[domainrows.GroupCall] out
    cdef domainrows.GroupCall call
    for root, ranks, rows, dtype in calls:
        call.root = root
        call.ranks = ranks
        call.rows = rows_of(rows)
        call.type = <capi.DType><int>dtype
        out.push_back(call)
    return out
