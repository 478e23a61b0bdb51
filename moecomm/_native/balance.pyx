# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The balance core, thinly: marshal, release the GIL, one call per layer. moecomm.balance documents and validates."""
from libc.stdint cimport int32_t

from moecomm._native cimport balance as core


def rebalance(const double[:, ::1] load, int32_t[:, ::1] placement, int groups, int nodes, int ranks,
              const int32_t[:, ::1] previous=None, int max_moves=-1):
    """Fill placement [L, slots] with the expert of every slot, from load [L, experts]."""
    cdef core.Grid grid
    cdef core.Options options
    cdef Py_ssize_t layer
    cdef bint follow = previous is not None
    grid.experts, grid.slots = <int32_t>load.shape[1], <int32_t>placement.shape[1]
    grid.groups, grid.nodes, grid.ranks = groups, nodes, ranks
    options.max_moves = max_moves
    with nogil:
        for layer in range(load.shape[0]):
            if follow:
                options.previous = &previous[layer, 0]
            core.rebalance_layer(grid, &load[layer, 0], options, &placement[layer, 0])
