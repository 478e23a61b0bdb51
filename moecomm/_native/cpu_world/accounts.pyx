# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Converts what native memory reports about its calls: spans of roles, rows and bytes."""
from libcpp.vector cimport vector

from moecomm._native cimport capi

# In the order of capi.RoleKind, which is that of a token's way.
ROLES = (
    "plan", "announce", "counts", "send", "forward", "arrive", "publish", "reduce", "sum", "done",
    "list", "decode send", "decode announce", "decode accept", "decode pack", "decode release",
    "decode answer", "decode wait", "decode sum",
)


cdef list named_spans(vector[capi.RoleSpan]& spans):
    """Return [(role, begin, end)]. Times are in seconds."""
    return [(ROLES[<int>s.role], s.begin * 1e-9, s.end * 1e-9) for s in spans]


cdef bytes bytes_of(const void* data, size_t size):
    return (<const char*>data)[:size] if size else b""


cdef tuple hops_of(const capi.Counters& c):
    return (c.rail.logical_rows, c.rail.physical_rows, c.rail.logical_bytes, c.rail.physical_bytes,
            c.node.logical_rows, c.node.physical_rows, c.node.logical_bytes, c.node.physical_bytes,
            c.replicated_rows)
