# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""A Domain of the cuda world. moecomm.fabric documents and validates."""
from libc.stdint cimport uint64_t, uintptr_t
from libcpp.memory cimport make_shared, shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi, cudaapi, domainrows
from moecomm._native.cuda_world.calls cimport Calls
from moecomm._native.cuda_world.domain_memory cimport DomainMemory
from moecomm._native.cuda_world.peer_access cimport PeerAccess
from moecomm._native.cuda_world.spread cimport spread_of
from moecomm._native.shared.domain_rows cimport group_calls_of, rows_of
from moecomm._native.shared.status cimport failure_of
from moecomm._native.shared.structures cimport geometry_from

from moecomm.errors import InvalidArgument


cdef class Domain:
    cdef shared_ptr[cudaapi.DeviceDomain] d

    def __cinit__(self, geometry, PeerAccess peer_access, Calls calls, int device, uint64_t heap_bytes, int counters,
                  spread, int stages, double timeout):
        cdef capi.Geometry g = geometry_from(geometry)
        cdef domainrows.DomainShape shape
        cdef cudaapi.Spread s = spread_of(spread, stages)
        shape.heap_bytes = heap_bytes
        shape.counters = counters
        shape.channels = s.sms * s.warps
        with nogil:
            self.d = make_shared[cudaapi.DeviceDomain](g, shape, device, peer_access.r, calls.c, s, timeout)

    cdef shared_ptr[cudaapi.DeviceDomain] borrow(self, str op) except *:
        if not self.d:
            raise InvalidArgument(f"{op}: the domain is closed", op=op)
        return self.d

    def __dealloc__(self):
        with nogil:
            self.d.reset()

    def contact(self):
        return <bytes>self.d.get().contact()

    def connect(self, list contacts):
        cdef vector[string] c = contacts
        with nogil:
            self.d.get().connect(c)

    def release(self):
        cdef shared_ptr[cudaapi.DeviceDomain] d = self.d
        self.d.reset()
        with nogil:
            d.reset()

    def memory(self, uint64_t size):
        """Return the first `size` bytes for tensors as device memory."""
        cdef DomainMemory memory = DomainMemory.__new__(DomainMemory)
        memory.w = self.d.get().window()
        memory.begin = self.d.get().heap()
        memory.size = size
        return memory

    @property
    def heap(self):
        """Offset of the memory for tensors in the window."""
        return self.d.get().heap()

    def from_window_only(self):
        """Whether the rail is a network that can only send from the domain's memory."""
        return self.d.get().from_window_only()

    def write(self, int rank, list rows, int counter, uintptr_t stream):
        cdef vector[domainrows.Rows] r = rows_of(rows)
        cdef capi.Status s
        cdef shared_ptr[cudaapi.DeviceDomain] held = self.borrow("write")
        with nogil:
            s = held.get().write(rank, r, counter, <void*>stream)
        return failure_of(s)

    def read(self, int rank, list rows, uintptr_t stream):
        cdef vector[domainrows.Rows] r = rows_of(rows)
        cdef capi.Status s
        cdef shared_ptr[cudaapi.DeviceDomain] held = self.borrow("read")
        with nogil:
            s = held.get().read(rank, r, <void*>stream)
        return failure_of(s)

    def signal(self, int rank, int counter, uint64_t add, uintptr_t stream):
        cdef capi.Status s
        cdef shared_ptr[cudaapi.DeviceDomain] held = self.borrow("signal")
        with nogil:
            s = held.get().signal(rank, counter, add, <void*>stream)
        return failure_of(s)

    def wait(self, int source, int counter, uint64_t at_least, uintptr_t stream):
        cdef capi.Status s
        cdef shared_ptr[cudaapi.DeviceDomain] held = self.borrow("wait")
        with nogil:
            s = held.get().wait(source, counter, at_least, <void*>stream)
        return failure_of(s)

    def fence(self, uintptr_t stream):
        cdef capi.Status s
        cdef shared_ptr[cudaapi.DeviceDomain] held = self.borrow("fence")
        with nogil:
            s = held.get().fence(<void*>stream)
        return failure_of(s)

    def multicast(self, list calls, int why, uintptr_t stream):
        """Return None or a Failure. why: a number of capi.Why; 0: this rank does not refuse."""
        cdef vector[domainrows.GroupCall] c = group_calls_of(calls)
        cdef capi.Status s
        cdef shared_ptr[cudaapi.DeviceDomain] held = self.borrow("multicast")
        with nogil:
            s = held.get().multicast(c, <capi.Why>why, <void*>stream)
        return failure_of(s)

    def reduce(self, list calls, int why, uintptr_t stream):
        """As multicast()."""
        cdef vector[domainrows.GroupCall] c = group_calls_of(calls)
        cdef capi.Status s
        cdef shared_ptr[cudaapi.DeviceDomain] held = self.borrow("reduce")
        with nogil:
            s = held.get().reduce(c, <capi.Why>why, <void*>stream)
        return failure_of(s)

    def counter(self, int source, int counter):
        cdef uint64_t value
        cdef shared_ptr[cudaapi.DeviceDomain] held = self.borrow("counter")
        with nogil:
            value = held.get().counter(source, counter)
        return value

    def take_counters(self):
        """Return (counters of the hops, bytes written to or read from every rank) since the last call."""
        cdef capi.Counters c
        cdef vector[uint64_t] links
        cdef shared_ptr[cudaapi.DeviceDomain] held = self.borrow("stats")
        with nogil:
            c = held.get().take_counters(links)
        return c, list(links)
