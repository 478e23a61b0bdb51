# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Information about the row kernels and UCX, and the row kernels themselves.

Baselines that replace only the transport use these kernels.
"""
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi


def isa():
    """Return the name of the build of the row kernels that this process uses."""
    return (<bytes>capi.row_kernels().name).decode()


def gather_rows(uintptr_t dst, uintptr_t src, uintptr_t index, int64_t rows, uint64_t row_bytes, bint stream):
    with nogil:
        capi.gather_rows(<char*>dst, <const char*>src, <const int64_t*>index, rows, row_bytes, stream)


def sum_rows(uintptr_t dst, uintptr_t src, uintptr_t index, uintptr_t weights, int64_t tokens, int terms,
             int64_t hidden, int dtype):
    with nogil:
        capi.sum_rows(<char*>dst, <const char*>src, <const int64_t*>index, <const float*>weights, tokens, terms,
                      hidden, <capi.DType>dtype)


def count_different(uintptr_t got, uintptr_t want, uintptr_t index, int64_t rows, int64_t row_elements,
                    int64_t element_bytes):
    cdef int64_t n
    with nogil:
        n = capi.count_different(<const char*>got, <const char*>want, <const int64_t*>index, rows, row_elements,
                                 element_bytes)
    return n


def set_ucx_folders(list folders):
    """Set folders in which UCX is searched before the libraries of the system."""
    cdef vector[string] paths = [folder.encode() for folder in folders]
    capi.set_ucx_folders(paths)


def ucx_version():
    """Return the version of the UCX that this process uses. Raise RuntimeError if there is none."""
    capi.require_ucx()
    return (<bytes>capi.UcxContext.version()).decode()


cdef _times(const vector[capi.RowKernelTime]& times):
    return [(times[i].name.decode(), times[i].few, times[i].many) for i in range(times.size())]


def row_kernel_choice():
    """Return the row kernels that this process uses, and the reason.

    The result is (build, variant for few terms, variant for many terms, reason, CPU, times as of time_row_kernels).
    """
    cdef const capi.RowKernelChoice* c = &capi.row_kernel_choice()
    return c.build.decode(), c.few.decode(), c.many.decode(), c.reason.decode(), c.cpu.decode(), _times(c.times)


def time_row_kernels(double seconds):
    """Return [(variant, ns per row in sums of few terms, ns in sums of many terms)] of all variants that run here."""
    cdef vector[capi.RowKernelTime] times
    with nogil:
        times = capi.time_row_kernels(capi.row_kernel_variants(), seconds)
    return _times(times)
