# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The way in which GPUs access each other's memory."""
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi, cudaapi
from moecomm._native.shared.structures cimport geometry_from


cdef class PeerAccess:
    """The way in which the ranks of a communicator access each other's windows."""

    @staticmethod
    def threads(int device):
        """Make the PeerAccess of rank threads: by pointer."""
        cdef PeerAccess peer_access = PeerAccess.__new__(PeerAccess)
        peer_access.r = cudaapi.thread_peer_access(device)
        return peer_access

    @staticmethod
    def processes(int device):
        """Make the PeerAccess of processes on one host: by CUDA IPC."""
        cdef PeerAccess peer_access = PeerAccess.__new__(PeerAccess)
        peer_access.r = cudaapi.process_peer_access(device)
        return peer_access

    @staticmethod
    def nccl(bytes library, geometry, int device, bytes unique_id):
        """Make the PeerAccess of any processes: by windows of NCCL. Collective; waits for every rank."""
        cdef PeerAccess peer_access = PeerAccess.__new__(PeerAccess)
        cdef capi.Geometry g = geometry_from(geometry)
        cdef string path = library, name = unique_id
        with nogil:
            peer_access.r = cudaapi.nccl_peer_access(path, g, device, name)
        return peer_access

    @property
    def rail(self):
        """Name of the transport between nodes."""
        return (<bytes>self.r.get().rail()).decode()

    def retired(self):
        """Return the numbers of windows that were closed here. Their memory is kept until all ranks close them."""
        return list(self.r.get().retired())

    def release(self, list numbers):
        """Free windows that all ranks have closed. All ranks pass the same numbers."""
        cdef vector[int] v = numbers
        with nogil:
            self.r.get().release(v)

    def abort(self):
        with nogil:
            self.r.get().abort()


def nccl_headers():
    """Return the version code of the NCCL headers of this build; 0: none."""
    return cudaapi.nccl_headers_()


def nccl_unique_id(bytes library):
    """Return a unique id for a new communicator of NCCL."""
    cdef string path = library, name
    with nogil:
        name = cudaapi.nccl_unique_id_(path)
    return <bytes>name
