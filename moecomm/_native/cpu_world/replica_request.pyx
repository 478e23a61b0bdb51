# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The request for a choice of replicas in a dispatch."""
from libc.stdint cimport int32_t, int64_t, uint32_t

from moecomm._native cimport capi
from moecomm._native.cpu_world.replica_policy cimport ReplicaPolicy


cdef class ReplicaRequest:
    """The request for a choice of replicas, with the memory for its results."""

    def __cinit__(self, ReplicaPolicy policy not None, uint32_t routing, int64_t[:, ::1] slots, int32_t[::1] counted):
        """The call writes slots [T, K] and counted [experts]. It is a mismatch if routing differs between ranks."""
        self.policy, self.routing, self.slots, self.counted = policy, routing, slots, counted

    cdef void ask(self, capi.DispatchCall* call):
        call.policy = self.policy.c.get()
        call.slots = &self.slots[0, 0] if self.slots.shape[0] else NULL
        call.counted = &self.counted[0]
        call.shape.routing = self.routing
