# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The rule by which the batches of one layer choose replicas."""
from libc.stdint cimport int32_t

from moecomm._native cimport capi


cdef class ReplicaPolicy:
    """The rule by which a layer chooses replicas. mode: 0 local, 1 even, 2 optimal. activate: 0: all slots may run."""

    def __cinit__(self, const int32_t[::1] physical_to_logical, int experts, int ranks, int nodes, int mode,
                  int activate):
        self.c.reset(new capi.ReplicaPolicy(&physical_to_logical[0], <int>physical_to_logical.shape[0], experts, ranks,
                                            nodes, <capi.Mode>mode, activate))

    @property
    def needs_all(self):
        """Whether the choice depends on the picks of all ranks."""
        return self.c.get().needs_all()
