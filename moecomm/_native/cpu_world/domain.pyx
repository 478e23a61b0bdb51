# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""A Domain of the cpu world. moecomm.fabric documents and validates.

Methods that begin with try_ are called first. They accept only arguments that are certainly valid, in a fraction of the
time of the checks in Python, and leave all others to these checks.
"""
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi, domainapi, domainrows
from moecomm._native.cpu_world.calls cimport enter, refuse_closed
from moecomm._native.cpu_world.communicator cimport Communicator
from moecomm._native.cpu_world.domain_memory cimport DomainMemory
from moecomm._native.cpu_world.faults cimport fault_of
from moecomm._native.shared.dlpack cimport DLTensor
from moecomm._native.shared.domain_rows cimport group_calls_of, rows_of
from moecomm._native.shared.extents cimport are_apart
from moecomm._native.shared.status cimport failure_of
from moecomm._native.shared.tensors cimport BFLOAT_CODE, FLOAT_CODE, are_alike, only_numbers, read_run

DOMAIN_RANKS = domainrows.kMaxContributors   # limit of a reduction: ranks of a node, and nodes


cdef class Domain:
    cdef shared_ptr[domainapi.Domain] d
    cdef Communicator comm
    cdef capi.Geometry geometry
    cdef const char* begin      # memory for tensors
    cdef uint64_t size
    cdef int counters

    def __cinit__(self, Communicator comm, uint64_t heap_bytes, int counters):
        cdef domainrows.DomainShape shape
        shape.heap_bytes = heap_bytes
        shape.counters = counters
        self.comm = comm
        enter(comm.c.get(), "Domain")
        with nogil:
            self.d = domainapi.make_domain(comm.c, shape)
        self.geometry = comm.c.get().geometry()
        self.begin, self.size = self.d.get().memory().get().data() + self.d.get().heap(), heap_bytes
        self.counters = counters

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

    def contact(self):
        return <bytes>self.d.get().contact()

    def connect(self, list contacts):
        cdef vector[string] c = contacts
        cdef shared_ptr[domainapi.Domain] held = self.borrow("Domain")
        with nogil:
            held.get().connect(c)
            held.reset()
        self.comm.left()

    def finish_connect(self):
        self.d.get().finish_connect()

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

    cdef bint is_symmetric(self, const DLTensor* t, uint64_t size) noexcept:
        """Whether a run lies in the memory for tensors."""
        return self.begin <= <const char*>t.data and <const char*>t.data + size <= self.begin + self.size

    cdef uint64_t offset_of(self, const DLTensor* t) noexcept:
        return <const char*>t.data - self.begin + self.d.get().heap()

    cdef bint one_run(self, rank, shared, own, domainrows.Segment* out) except -1:
        """Read the arguments of a write or a read of one run. Return whether they are certainly valid."""
        cdef DLTensor there, here
        cdef uint64_t size, more
        if type(rank) is not int or not 0 <= rank < self.geometry.size or rank == self.geometry.rank:
            return False
        if not only_numbers(shared, own) or not read_run(shared, &there, &size) or not read_run(own, &here, &more):
            return False
        if not are_alike(&there, &here) or not self.is_symmetric(&there, size):
            return False
        out.there, out.here, out.bytes = self.offset_of(&there), <char*>here.data, size
        return True

    def try_write(self, rank, dst, src, counter):
        """Write one run. Return None or a Failure, or False if the arguments need the checks in Python."""
        cdef domainrows.Segment segment
        cdef domainrows.Segments one
        cdef capi.Status s
        cdef int number = -1, to
        cdef shared_ptr[domainapi.Domain] held = self.borrow("write")
        if counter is not None:
            if type(counter) is not int or not 0 <= counter < self.counters:
                return False
            number = counter
        if not self.one_run(rank, dst, src, &segment):
            return False
        one.segment, one.count = &segment, 1
        to = rank
        with nogil:
            s = held.get().write(to, one, number)
            held.reset()
        return self.left(s)

    def try_read(self, rank, dst, src):
        """As try_write()."""
        cdef domainrows.Segment segment
        cdef domainrows.Segments one
        cdef capi.Status s
        cdef int of
        cdef shared_ptr[domainapi.Domain] held = self.borrow("read")
        if not self.one_run(rank, src, dst, &segment):
            return False
        one.segment, one.count = &segment, 1
        of = rank
        with nogil:
            s = held.get().read(of, one)
            held.reset()
        return self.left(s)

    cdef bint one_call(self, ranks, root, shared, own, bint sums, domainrows.GroupCall* call) except -1:
        """Read the arguments of a multicast or a reduction of one run. Return whether they are certainly valid."""
        cdef DLTensor there, here
        cdef uint64_t size, more
        cdef domainrows.Rows row
        cdef int last = -1, mine
        cdef bint at_root
        if type(root) is not int or not 0 <= root < self.geometry.size:
            return False
        at_root = root == self.geometry.rank
        if type(ranks) is not range and type(ranks) is not list and type(ranks) is not tuple:
            return False
        if sums and not 1 <= len(ranks) <= DOMAIN_RANKS // 2:
            return False
        for r in ranks:
            if type(r) is not int or not last < r < self.geometry.size:   # ascending
                return False
            last = mine = r
            call.ranks.push_back(mine)
        if not only_numbers(shared, own if at_root else None) or not read_run(shared, &there, &size):
            return False
        if not self.is_symmetric(&there, size):
            return False
        if sums:
            if there.dtype.code == BFLOAT_CODE and there.dtype.bits == 16:
                call.type = capi.DType.bf16
            elif there.dtype.code == FLOAT_CODE and there.dtype.bits == 16:
                call.type = capi.DType.f16
            elif there.dtype.code == FLOAT_CODE and there.dtype.bits == 32:
                call.type = capi.DType.f32
            else:
                return False
        if at_root:
            if not read_run(own, &here, &more) or not are_alike(&there, &here):
                return False
            if not are_apart(there.data, size, here.data, size):
                return False
            row.here = <char*>here.data
        row.there, row.bytes, row.count = self.offset_of(&there), size, 1
        call.root = root
        call.rows.push_back(row)
        return True

    def try_multicast(self, ranks, dst, src, root):
        """As try_write()."""
        cdef vector[domainrows.GroupCall] c
        cdef capi.Status s
        cdef shared_ptr[domainapi.Domain] held = self.borrow("multicast")
        c.resize(1)
        if not self.one_call(ranks, root, dst, src, False, &c[0]):
            return False
        c[0].type = <capi.DType>0   # as in multicast(); the ranks compare it
        with nogil:
            s = held.get().multicast(c, capi.Why.none)
            held.reset()
        return self.left(s)

    def try_reduce(self, ranks, dst, src, root):
        """As try_write(). Sums are in FP32."""
        cdef vector[domainrows.GroupCall] c
        cdef capi.Status s
        cdef shared_ptr[domainapi.Domain] held = self.borrow("reduce")
        c.resize(1)
        if not self.one_call(ranks, root, src, dst, True, &c[0]):
            return False
        with nogil:
            s = held.get().reduce(c, capi.Why.none)
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

    def bare_copy(self, int peer, uint64_t there, uintptr_t here, uint64_t size, int times, bint reads):
        """Copy to the memory of a peer, or from it, by memcpy. For benchmarks."""
        cdef capi.Status s
        cdef shared_ptr[domainapi.Domain] held = self.borrow("bare copy")
        with nogil:
            s = domainapi.bare_copy(held.get()[0], peer, there, <char*>here, size, times, reads)
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
