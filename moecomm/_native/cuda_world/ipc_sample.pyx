# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""A sample of memory that tests whether CUDA IPC works."""
from libcpp.memory cimport shared_ptr

from moecomm._native cimport cudaapi


cdef class IpcSample:
    """A sample of memory that tests whether CUDA IPC works, before windows are made."""
    cdef shared_ptr[cudaapi.IpcSample] s

    def __cinit__(self, int device):
        self.s = cudaapi.ipc_sample(device)

    def handle(self):
        """Return the handle for other processes; empty if this GPU cannot export memory."""
        return <bytes>self.s.get().handle()

    def opens(self, bytes handle):
        """Whether this process can map the memory of another one."""
        return self.s.get().opens(handle)
