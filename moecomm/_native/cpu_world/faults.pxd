# Faults that tests inject into the calls of a rank, by name.
from libc.stdint cimport int64_t

from moecomm._native cimport capi
from moecomm._native.shared.status cimport phase_of


cdef inline capi.Fault fault_of(str point, str action, int64_t passes, str phase) except *:
    cdef capi.Fault fault
    # In the order of capi.FaultPoint and capi.FaultAction.
    fault.point = <capi.FaultPoint><int>("none", "put", "copy", "reduce", "wait").index(point)
    fault.action = <capi.FaultAction><int>("damage", "omit", "stop", "kill").index(action)
    fault.phase = phase_of(phase)
    fault.passes = passes
    return fault
