# The balance core as Cython sees it: declarations only.
from libc.stdint cimport int32_t

cdef extern from "balance/rebalance.hpp" namespace "moecomm::balance" nogil:
    cdef cppclass Grid:
        int32_t experts
        int32_t slots
        int32_t groups
        int32_t nodes
        int32_t ranks

    cdef cppclass Options:
        const int32_t* previous
        int32_t max_moves

    void rebalance_layer(const Grid&, const double* load, const Options&, int32_t* placement) except +
