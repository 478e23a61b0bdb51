# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""A Domain of the cpu world. moecomm.fabric documents and validates."""
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi, domainapi, domainrows
from moecomm._native.cpu_world.calls cimport enter, refuse_closed
from moecomm._native.cpu_world.communicator cimport Communicator
from moecomm._native.cpu_world.domain_memory cimport DomainMemory
from moecomm._native.cpu_world.faults cimport fault_of
from moecomm._native.shared.domain_rows cimport group_calls_of, rows_of
from moecomm._native.shared.status cimport failure_of

DOMAIN_RANKS = domainrows.kMaxContributors   # limit of a reduction: ranks of a node, and nodes


cdef class Domain:
    cdef shared_ptr[domainapi.Domain] d
    cdef Communicator comm

    def __cinit__(self, Communicator comm, uint64_t heap_bytes, int counters):
        cdef domainrows.DomainShape shape
        shape.heap_bytes = heap_bytes
        shape.counters = counters
        self.comm = comm
        enter(comm.c.get(), "Domain")
        with nogil:
            self.d = domainapi.make_domain(comm.c, shape)

    def __dealloc__(self):
        with nogil:
            self.d.reset()

    cdef shared_ptr[domainapi.Domain] borrow(self, str op) except *:
        if not self.d:
            refuse_closed(op, "domain")
        enter(&self.d.get().comm(), op)
        return self.d

    cdef object left(self, const capi.Status& s):
        """Complete a native call. Return None or a Failure."""
        self.comm.left()
        return failure_of(s)

    def card(self):
        return <bytes>self.d.get().card()

    def connect(self, list cards):
        cdef vector[string] c = cards
        cdef shared_ptr[domainapi.Domain] held = self.borrow("Domain")
        with nogil:
            held.get().connect(c)
            held.reset()
        self.comm.left()

    def connected(self):
        self.d.get().connected()

    def release(self):
        """As Buffer.release()."""
        cdef shared_ptr[domainapi.Domain] d = self.d
        self.d.reset()
        with nogil:
            if d:
                d.get().comm().calls().wait()
            d.reset()
        self.comm.left()

    def memory(self, uint64_t size):
        """Return the first `size` bytes for tensors as a buffer."""
        cdef DomainMemory memory = DomainMemory.__new__(DomainMemory)
        memory.m = self.d.get().memory()
        memory.begin = self.d.get().heap()
        memory.size = size
        return memory

    @property
    def heap(self):
        """Offset of the memory for tensors in the window."""
        return self.d.get().heap()

    def rail_is_mapped(self):
        """As Buffer.rail_is_mapped()."""
        return self.d.get().rail_is_mapped()

    def write(self, int rank, list rows, int counter):
        cdef vector[domainrows.Rows] r = rows_of(rows)
        cdef capi.Status s
        cdef shared_ptr[domainapi.Domain] held = self.borrow("write")
        with nogil:
            s = held.get().write(rank, r, counter)
            held.reset()
        return self.left(s)

    def read(self, int rank, list rows):
        cdef vector[domainrows.Rows] r = rows_of(rows)
        cdef capi.Status s
        cdef shared_ptr[domainapi.Domain] held = self.borrow("read")
        with nogil:
            s = held.get().read(rank, r)
            held.reset()
        return self.left(s)

    def signal(self, int rank, int counter, uint64_t add):
        cdef capi.Status s
        cdef shared_ptr[domainapi.Domain] held = self.borrow("signal")
        with nogil:
            s = held.get().signal(rank, counter, add)
            held.reset()
        return self.left(s)

    def wait(self, int source, int counter, uint64_t at_least):
        cdef capi.Status s
        cdef shared_ptr[domainapi.Domain] held = self.borrow("wait")
        with nogil:
            s = held.get().wait(source, counter, at_least)
            held.reset()
        return self.left(s)

    def fence(self):
        cdef capi.Status s
        cdef shared_ptr[domainapi.Domain] held = self.borrow("fence")
        with nogil:
            s = held.get().fence()
            held.reset()
        return self.left(s)

    def counter(self, int source, int counter):
        return self.borrow("counter").get().counter(source, counter)

    def multicast(self, list calls, int why):
        """Return None or a Failure. why: a number of capi.Why; 0: this rank does not refuse."""
        cdef vector[domainrows.GroupCall] c = group_calls_of(calls)
        cdef capi.Status s
        cdef shared_ptr[domainapi.Domain] held = self.borrow("multicast")
        with nogil:
            s = held.get().multicast(c, <capi.Why>why)
            held.reset()
        return self.left(s)

    def reduce(self, list calls, int why):
        """As multicast()."""
        cdef vector[domainrows.GroupCall] c = group_calls_of(calls)
        cdef capi.Status s
        cdef shared_ptr[domainapi.Domain] held = self.borrow("reduce")
        with nogil:
            s = held.get().reduce(c, <capi.Why>why)
            held.reset()
        return self.left(s)

    def ping(self, int peer, uint64_t there, uintptr_t here, uint64_t size, int rounds, uint64_t done, bint bare):
        """Write alternately with a peer, through the verbs or by plain stores. For benchmarks."""
        cdef capi.Status s
        cdef shared_ptr[domainapi.Domain] held = self.borrow("ping")
        with nogil:
            s = domainapi.ping(held.get()[0], peer, there, <char*>here, size, rounds, done, bare)
            held.reset()
        return self.left(s)

    def take_counters(self):
        """Return (counters of the hops, bytes written to or read from every rank) since the last call."""
        cdef capi.Counters c
        cdef vector[uint64_t] links
        cdef shared_ptr[domainapi.Domain] held = self.borrow("stats")
        with nogil:
            c = held.get().take_counters(links)
            held.reset()
        self.comm.left()
        return c, list(links)

    def set_fault(self, str point, str action, int64_t passes=0, str phase="none"):
        """As Buffer.set_fault. For tests."""
        self.d.get().set_fault(fault_of(point, action, passes, phase))
