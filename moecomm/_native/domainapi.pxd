# Declarations of the C++ Domain of the cpu world for Cython.
from libc.stdint cimport uint64_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native.capi cimport Communicator, Counters, Fault, Memory, Status, Why
from moecomm._native.domainrows cimport DomainShape, GroupCall, Rows, Segments

cdef extern from "runtime/cpu/domain.hpp" namespace "moecomm" nogil:
    cdef cppclass Domain:
        string contact() except +
        void connect(const vector[string]&) except +
        void finish_connect()
        Status write(int rank, const vector[Rows]&, int counter) except +
        Status read(int rank, const vector[Rows]&) except +
        Status write(int rank, Segments, int counter)
        Status read(int rank, Segments)
        Status signal(int rank, int counter, uint64_t add)
        Status wait(int source, int counter, uint64_t at_least)
        Status fence()
        uint64_t counter(int source, int counter)
        Status multicast(const vector[GroupCall]&, Why) except +
        Status reduce(const vector[GroupCall]&, Why) except +
        bool rail_is_mapped()
        shared_ptr[Memory] memory()
        uint64_t heap()
        Communicator& comm()
        Counters take_counters(vector[uint64_t]&) except +
        void set_fault(Fault)

    shared_ptr[Domain] make_domain "moecomm::make_owned<moecomm::Domain>"(
        shared_ptr[Communicator], DomainShape) except +

cdef extern from "runtime/cpu/domain_floor.hpp" namespace "moecomm" nogil:
    Status ping(Domain&, int peer, uint64_t there, char* here, uint64_t size, int rounds, uint64_t done, bool bare)
    Status bare_copy(Domain&, int peer, uint64_t there, char* here, uint64_t size, int times, bool reads)
