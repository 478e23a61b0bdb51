from libc.stdint cimport int32_t, int64_t, uint64_t

from moecomm._native cimport capi
from moecomm._native.shared.dlpack cimport DLTensor

# Type codes of DLPack.
cdef enum:
    INT_CODE = 0
    FLOAT_CODE = 2
    BFLOAT_CODE = 4


cdef bint can_make() noexcept
cdef bint has_tangents() except -1
cdef bint only_numbers(object a, object b) except -1
cdef bint read_matrix(object tensor, DLTensor* t, int64_t columns, int code, int bits) except -1
cdef bint read_rows(object tensor, DLTensor* t, const capi.Shape* shape) except -1
cdef bint read_vector(object tensor, DLTensor* t, int64_t length) except -1
cdef bint read_run(object tensor, DLTensor* t, uint64_t* size) except -1
cdef bint are_alike(const DLTensor* a, const DLTensor* b) noexcept
cdef bint read_ids(object tensor, DLTensor* t, int64_t columns, const int64_t** ids64,
                   const int32_t** ids32) except -1
cdef object make_tensor(object owner, char* data, int code, int bits, int64_t rows, int64_t columns, char** place)
cdef object make_rows(object owner, char* data, const capi.Shape* shape, int64_t rows, char** place)
cdef object copy_numbers(const int64_t* numbers, int n)
