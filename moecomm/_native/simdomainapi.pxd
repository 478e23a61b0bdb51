# Declarations of the simulated C++ Domain for Cython.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libcpp cimport bool
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native.capi cimport Status
from moecomm._native.simapi cimport Chaos, Hardware, Mutation, SimNet

cdef extern from "runtime/sim/domain.hpp" namespace "moecomm" nogil:
    cdef cppclass SimDomainConfig:
        int size
        int ranks_per_node
        int num_sms
        uint64_t heap_bytes
        Hardware hardware
        bool payload

    cdef enum class SimDomainVerb(int32_t):
        multicast
        reduce
        ring

    cdef cppclass SimGroup:
        int32_t root
        vector[int32_t] ranks
        uint64_t shared
        uint64_t own
        uint64_t bytes
        int64_t count

    cdef cppclass SimDomainCall:
        SimDomainVerb verb
        vector[SimGroup] groups
        uint8_t odd

    cdef struct SimDomainResult:
        uint64_t begin
        uint64_t end
        Status status
        uint64_t digest

    cdef cppclass SimDomainFinding:
        bool found
        uint64_t schedules
        uint64_t seed
        int call
        int rank
        string what

    cdef cppclass SimDomain:
        SimDomain(const SimDomainConfig&) except +
        void reset(const Chaos&) except +
        const vector[SimDomainResult]& run(const vector[SimDomainCall]&) except +
        SimDomainFinding explore(const vector[SimDomainCall]&, const Mutation&, uint64_t, uint64_t) except +
        SimNet& net()
        char* heap(int rank)
