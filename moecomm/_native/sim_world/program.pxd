from libcpp.vector cimport vector

from moecomm._native cimport simapi as world


cdef class Program:
    cdef vector[world.SimCall] calls
    cdef list kept
