# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The state of a communicator's calls in the cuda world."""
from libcpp.memory cimport make_shared
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi, cudaapi
from moecomm._native.cuda_world.peer_access cimport PeerAccess
from moecomm._native.shared.status cimport failure_of
from moecomm._native.shared.structures cimport geometry_from


cdef class Calls:
    """The failures that kernels have found, and the board of the ranks. Construction is collective."""

    def __cinit__(self, geometry, PeerAccess peer_access, int device):
        cdef capi.Geometry g = geometry_from(geometry)
        with nogil:
            self.c = make_shared[cudaapi.DeviceCalls](device)
            self.c.get().make_board(g, peer_access.r.get()[0])

    def contact(self):
        return <bytes>self.c.get().contact()

    def connect(self, list contacts):
        cdef vector[string] c = contacts
        with nogil:
            self.c.get().connect(c)

    def fault(self):
        """Return the failure that has broken the communicator, if kernels have reported it, or None."""
        return failure_of(self.c.get().fault())
