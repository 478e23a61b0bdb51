# Declarations of the C++ balance code for Cython.
from libc.stdint cimport int32_t, int64_t, uint8_t
from libcpp.vector cimport vector

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
        bint connected

    void rebalance_layer(const Grid&, const double* load, const Options&, int32_t* placement) except +

cdef extern from "balance/prefetch.hpp" namespace "moecomm::balance" nogil:
    cdef cppclass PrefetchShape:
        int32_t experts
        int32_t ranks
        int32_t nodes
        int32_t slots
        int32_t spare

    cdef cppclass Prefetch:
        Prefetch(const PrefetchShape&, const double* load, const int32_t* table) except +
        int64_t lowest(int64_t most, int32_t* table) except +

cdef extern from "balance/replicas.hpp" namespace "moecomm::balance" nogil:
    cdef cppclass CppReplicas "moecomm::balance::Replicas":
        CppReplicas(const int32_t* physical_to_logical, int slots, int experts, int ranks, int nodes) except +
        int experts
        int ranks
        int nodes
        vector[int32_t] first
        vector[int32_t] slot
        vector[int32_t] rank

cdef extern from "balance/split.hpp" namespace "moecomm::balance" nogil:
    double split(const CppReplicas&, const double* load, const uint8_t* active, int rounds, double* share) except +
    void runs(const CppReplicas&, const int32_t* total, const double* share, int turn, int32_t* first, int32_t* last)

cdef extern from "balance/activate.hpp" namespace "moecomm::balance" nogil:
    int activate_replicas "moecomm::balance::activate"(
        const CppReplicas&, const double* load, int limit, uint8_t* active) except +
