# Converts the log of a simulated run to Python values.
from moecomm._native cimport capi
from moecomm._native cimport simapi as world

cdef dict line_of(const world.LogLine& l)
cdef dict waiting_of(const world.RoleState& r)
cdef world.Mutation mutation_of(str mutant, str phase, bint chosen) except *
cdef int fill_hardware(world.Hardware* h, dict hardware) except -1
