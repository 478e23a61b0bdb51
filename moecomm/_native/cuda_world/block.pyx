# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Block: one piece of the arena of a GPU, the memory of one result."""
from libc.stdint cimport uintptr_t


cdef class Block:
    """The memory of one result. Tensors view it, and it is freed with the last of them."""

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": (self.b.get().bytes(),),
            "typestr": "|u1",
            "data": (<uintptr_t>self.b.get().data(), False),
            "version": 3,
        }

    @property
    def nbytes(self):
        return self.b.get().bytes()

    @property
    def address(self):
        return <uintptr_t>self.b.get().data()
