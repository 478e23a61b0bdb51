# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""A Domain on the virtual clock. moecomm.sim.fabric documents and validates."""
from libc.stdint cimport uint64_t
from libcpp.memory cimport unique_ptr
from libcpp.vector cimport vector

from moecomm._native cimport simapi as world
from moecomm._native cimport simdomainapi as dom
from moecomm._native.shared.status cimport name_of_code
from moecomm._native.sim_world.log cimport fill_hardware, mutation_of


cdef vector[dom.SimDomainCall] _domain_program(list program) except *:
    """Convert [(number of the verb, odd rank, [(root, ranks, shared, own, bytes, pieces)])]."""
    cdef vector[dom.SimDomainCall] out
    cdef dom.SimDomainCall call
    cdef dom.SimGroup group
    for verb, odd, groups in program:
        call.verb, call.odd = <dom.SimDomainVerb><int>verb, odd
        call.groups.clear()
        for root, ranks, shared, own, size, count in groups:
            group.root, group.ranks, group.shared, group.own = root, ranks, shared, own
            group.bytes, group.count = size, count
            call.groups.push_back(group)
        out.push_back(call)
    return out


cdef class DomainCluster:
    """The ranks of a simulated Domain."""
    cdef unique_ptr[dom.SimDomain] d
    cdef int size
    cdef uint64_t heap_bytes

    def __cinit__(self, int size, int ranks_per_node, uint64_t heap_bytes, dict hardware, bint payload):
        cdef dom.SimDomainConfig c
        fill_hardware(&c.hardware, hardware)
        c.size, c.ranks_per_node, c.heap_bytes, c.payload = size, ranks_per_node, heap_bytes, payload
        self.size, self.heap_bytes = size, heap_bytes
        self.d.reset(new dom.SimDomain(c))

    def run(self, list program, seed=None):
        """Run a program. Return [[(begin, end, code, peer) by rank] by call]. Times are in ps."""
        cdef vector[dom.SimDomainCall] calls = _domain_program(program)
        cdef vector[dom.SimDomainResult] got
        self.d.get().reset(world.Chaos() if seed is None else world.Chaos(<uint64_t>seed, <uint64_t>-1))
        with nogil:
            got = self.d.get().run(calls)
        cdef const dom.SimDomainResult* r
        cdef size_t i
        cdef list results = [], ranks = []
        for i in range(got.size()):
            r = &got[i]
            if i % self.size == 0:
                ranks = []
                results.append(ranks)
            ranks.append((r.begin, r.end, name_of_code(r.status.code), r.status.peer))
        return results

    def heap(self, int rank):
        """Return a copy of the heap of a rank."""
        return (<const char*>self.d.get().heap(rank))[:self.heap_bytes]

    def links(self, int rank):
        """Return the bytes of rows that a rank has sent on its rail and moved inside its node."""
        cdef world.SimRank* r = &self.d.get().net().rank(rank)
        return r.rail_sent.row_bytes, r.node_moved.row_bytes

    def explore(self, list program, str mutant, str phase, uint64_t first_seed, uint64_t count):
        """Explore `count` schedules. Return the finding."""
        cdef vector[dom.SimDomainCall] calls = _domain_program(program)
        cdef world.Mutation m = mutation_of(mutant, phase, False)
        cdef dom.SimDomainFinding f
        with nogil:
            f = self.d.get().explore(calls, m, first_seed, count)
        return {
            "found": f.found,
            "schedules": f.schedules,
            "seed": f.seed,
            "call": f.call,
            "rank": f.rank,
            "what": f.what.decode(),
        }
