# Converts spans of roles and counters to Python values.
from libcpp.vector cimport vector

from moecomm._native cimport capi


cdef list named_spans(vector[capi.RoleSpan]& spans)
cdef bytes bytes_of(const void* data, size_t size)
cdef tuple hops_of(const capi.Counters& c)
