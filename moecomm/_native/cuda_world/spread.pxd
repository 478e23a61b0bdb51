# Converts the numbers of a launch plan to a C++ structure.
from moecomm._native cimport cudaapi


cdef inline cudaapi.Spread spread_of(spread, int stages) except *:
    """Of (sms, warps, senders, stage bytes)."""
    cdef cudaapi.Spread s
    s.sms, s.warps, s.senders, s.stage_bytes = spread
    s.stages = stages
    return s
