# Ranges of memory, and whether they overlap.
from libc.stdint cimport uint64_t, uintptr_t

from moecomm._native cimport capi


cdef struct Extent:   # a range of memory
    const char* data
    uint64_t size


cdef struct Windows:   # windows of the buffer and of its decode path (empty if there is none)
    Extent own
    Extent decode


cdef inline Extent extent_of(const capi.Memory& memory) noexcept:
    cdef Extent e
    e.data, e.size = memory.data(), memory.bytes()
    return e


cdef inline bint are_apart(const void* a, uint64_t a_bytes, const void* b, uint64_t b_bytes) noexcept:
    """Whether two ranges of memory do not overlap."""
    return <uintptr_t>a + a_bytes <= <uintptr_t>b or <uintptr_t>b + b_bytes <= <uintptr_t>a


cdef inline bint are_outside(const Windows& windows, const void* data, uint64_t size) noexcept:
    """Whether a range of memory does not overlap with the windows."""
    return (are_apart(data, size, windows.own.data, windows.own.size)
            and are_apart(data, size, windows.decode.data, windows.decode.size))
