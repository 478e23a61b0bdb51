# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The native balance code: convert arguments, release the GIL, make one call per layer.

moecomm.balance documents and validates.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t

from moecomm._native cimport balanceapi as core


def rebalance(const double[:, ::1] load, int32_t[:, ::1] placement, int groups, int nodes, int ranks,
              const int32_t[:, ::1] previous=None, int max_moves=-1, bint connected=False):
    """Write the expert of every slot to placement [L, slots], from load [L, experts]."""
    cdef core.Grid grid
    cdef core.Options options
    cdef Py_ssize_t layer
    cdef bint follow = previous is not None
    grid.experts, grid.slots = <int32_t>load.shape[1], <int32_t>placement.shape[1]
    grid.groups, grid.nodes, grid.ranks = groups, nodes, ranks
    options.max_moves = max_moves
    options.connected = connected
    with nogil:
        for layer in range(load.shape[0]):
            if follow:
                options.previous = &previous[layer, 0]
            core.rebalance_layer(grid, &load[layer, 0], options, &placement[layer, 0])


def prefetch(const double[::1] load, const int32_t[:, ::1] table, int nodes, int spare, int64_t most,
             int32_t[:, ::1] placement):
    """Write placement [ranks, slots] of one layer from its load [experts]. Return the number of copies that move."""
    cdef core.PrefetchShape shape
    cdef core.Prefetch* layer
    cdef int64_t copies
    shape.experts, shape.ranks, shape.nodes = <int32_t>load.shape[0], <int32_t>table.shape[0], nodes
    shape.slots, shape.spare = <int32_t>table.shape[1], spare
    with nogil:
        layer = new core.Prefetch(shape, &load[0], &table[0, 0])
        try:
            copies = layer.lowest(most, &placement[0, 0])
        finally:
            del layer
    return copies


cdef class Replicas:
    """The replicas of one layer, ordered by expert. `first` [E + 1] indexes slot [n] and rank [n]."""
    cdef core.CppReplicas* r
    cdef readonly int experts, ranks, count

    def __cinit__(self, const int32_t[::1] physical_to_logical, int experts, int ranks, int nodes):
        self.r = new core.CppReplicas(&physical_to_logical[0], <int>physical_to_logical.shape[0], experts, ranks, nodes)
        self.experts, self.ranks, self.count = experts, ranks, <int>self.r.slot.size()

    def __dealloc__(self):
        del self.r

    @property
    def first(self):
        return list(self.r.first)

    @property
    def slot(self):
        return list(self.r.slot)

    @property
    def rank(self):
        return list(self.r.rank)

    def split(self, const double[::1] load, double[::1] share, const uint8_t[::1] active=None, int rounds=24):
        """Write the fractional tokens of every replica to share [replicas]. Return the largest load of a rank."""
        cdef double most
        cdef const uint8_t* mask = NULL
        if active is not None:
            mask = &active[0]
        with nogil:
            most = core.split(self.r[0], &load[0], mask, rounds, &share[0])
        return most

    def runs(self, const int32_t[::1] total, const double[::1] share, int turn, int32_t[::1] first, int32_t[::1] last):
        """Write the range of its expert's tokens, of total [E], for each replica to first and last [replicas]."""
        with nogil:
            core.runs(self.r[0], &total[0], &share[0], turn, &first[0], &last[0])

    def activate(self, const double[::1] load, int limit, uint8_t[::1] active):
        """Write at most `limit` ones per rank to active [replicas]. Return -1, or an expert that no choice can run."""
        cdef int stuck
        with nogil:
            stuck = core.activate_replicas(self.r[0], &load[0], limit, &active[0])
        return stuck
