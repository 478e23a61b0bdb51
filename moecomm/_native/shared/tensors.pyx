# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Reads and makes tensors with one C call each, through the exchange table of DLPack.

With a few tokens per call, calling the methods of a tensor for its pointer, shape and strides takes longer than the
call itself.
"""
from cpython.exc cimport PyErr_Clear
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy
from posix.stdlib cimport posix_memalign

from moecomm._native cimport capi
from moecomm._native.shared.dlpack cimport DLTensor, ExchangeTable, Managed

cdef object _tensor_type = None, _grad_enabled = None, _modes = None, _forward_ad = None
cdef ExchangeTable* _exchange = NULL


def read_tensors_of(tensor_type, grad_enabled, modes, forward_ad):
    """Set the tensor class whose objects are read without calling their methods. Return whether that works.

    grad_enabled() tells whether gradients are on, modes() how many torch modes intercept calls, and
    forward_ad._current_level whether forward-mode AD is on.
    """
    global _tensor_type, _exchange, _grad_enabled, _modes, _forward_ad
    _grad_enabled, _modes, _forward_ad = grad_enabled, modes, forward_ad
    capsule = getattr(tensor_type, "__dlpack_c_exchange_api__", None)
    if capsule is None or not PyCapsule_IsValid(capsule, "dlpack_exchange_api"):
        return False
    cdef ExchangeTable* table = <ExchangeTable*>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    if table.major != 1 or table.read == NULL:
        return False
    _tensor_type, _exchange = tensor_type, table
    return True


cdef bint can_make() noexcept:
    """Whether make_tensor() works. It needs the exchange table of torch."""
    return _exchange != NULL


cdef bint has_tangents() except -1:
    """Whether forward-mode AD is on, so that a tensor may have a tangent."""
    return _forward_ad._current_level >= 0


cdef bint only_numbers(object a, object b) except -1:
    """Whether a call needs only native code: no gradient or tangent is required, and no torch mode intercepts calls.

    It is the opposite of ops.wanted, except for compilers.
    """
    if has_tangents():
        return False
    if (getattr(a, "requires_grad", False) or getattr(b, "requires_grad", False)) and _grad_enabled():
        return False
    return _modes() == 0


cdef bint _empty(const DLTensor* t) noexcept:
    """Whether a tensor has no elements."""
    cdef int i
    for i in range(t.ndim):
        if t.shape[i] == 0:
            return True
    return False


cdef bint read_matrix(object tensor, DLTensor* t, int64_t columns, int code, int bits) except -1:
    """Read a tensor. Return whether it is a contiguous matrix on the CPU with this number of columns and type."""
    if _exchange == NULL or type(tensor) is not _tensor_type:
        return False
    if code != INT_CODE and tensor.is_neg():   # its memory does not have the sign
        return False
    if _exchange.read(<void*>tensor, t) != 0:
        PyErr_Clear()
        return False
    if t.data == NULL and not _empty(t):   # a freed storage; moecomm.tensors reports it
        return False
    t.data = <char*>t.data + t.byte_offset
    if t.device_type != 1 or t.ndim != 2 or t.dtype.code != code or t.dtype.bits != bits or t.shape[1] != columns:
        return False
    if t.strides == NULL or t.shape[0] == 0:
        return True
    return t.strides[1] == 1 and (t.shape[0] == 1 or t.strides[0] == columns)


cdef int _code_of(const capi.Shape* shape):
    return BFLOAT_CODE if shape.dtype == capi.DType.bf16 else FLOAT_CODE


cdef int _bits_of(const capi.Shape* shape):
    return 64 if shape.dtype == capi.DType.f64 else 32 if shape.dtype == capi.DType.f32 else 16


cdef bint read_rows(object tensor, DLTensor* t, const capi.Shape* shape) except -1:
    """Read a tensor. Return whether it is a contiguous matrix of rows of the buffer."""
    return read_matrix(tensor, t, shape.hidden, _code_of(shape), _bits_of(shape))


cdef bint read_vector(object tensor, DLTensor* t, int64_t length) except -1:
    """Read a tensor. Return whether it is a contiguous vector of this number of floats on the CPU."""
    if _exchange == NULL or type(tensor) is not _tensor_type or tensor.is_neg():
        return False
    if _exchange.read(<void*>tensor, t) != 0:
        PyErr_Clear()
        return False
    if t.data == NULL and not _empty(t):
        return False
    t.data = <char*>t.data + t.byte_offset
    if t.device_type != 1 or t.ndim != 1 or t.dtype.code != FLOAT_CODE or t.dtype.bits != 32:
        return False
    return t.shape[0] == length and (t.strides == NULL or length <= 1 or t.strides[0] == 1)


cdef bint read_run(object tensor, DLTensor* t, uint64_t* size) except -1:
    """Read a tensor. Return whether it is contiguous on the CPU and has elements. size: its number of bytes."""
    cdef int64_t expected = 1
    cdef int i
    if _exchange == NULL or type(tensor) is not _tensor_type:
        return False
    if _exchange.read(<void*>tensor, t) != 0:
        PyErr_Clear()
        return False
    if t.device_type != 1 or t.data == NULL or t.dtype.lanes != 1 or t.dtype.bits % 8 != 0:
        return False
    if t.dtype.code != INT_CODE:
        if t.dtype.code != FLOAT_CODE and t.dtype.code != BFLOAT_CODE or tensor.is_neg():   # no sign in its memory
            return False
    for i in range(t.ndim - 1, -1, -1):
        if t.strides != NULL and t.shape[i] != 1 and t.strides[i] != expected:
            return False
        expected *= t.shape[i]
    t.data = <char*>t.data + t.byte_offset
    size[0] = expected * (t.dtype.bits // 8)
    return expected > 0


cdef bint are_alike(const DLTensor* a, const DLTensor* b) noexcept:
    """Whether two tensors have the same dtype and shape."""
    cdef int i
    if a.ndim != b.ndim or a.dtype.code != b.dtype.code or a.dtype.bits != b.dtype.bits:
        return False
    for i in range(a.ndim):
        if a.shape[i] != b.shape[i]:
            return False
    return True


cdef bint read_ids(object tensor, DLTensor* t, int64_t columns, const int64_t** ids64,
                   const int32_t** ids32) except -1:
    """Read a tensor. Return whether it is a contiguous matrix of int64 or int32 with this number of columns."""
    if read_matrix(tensor, t, columns, INT_CODE, 64):
        ids64[0] = <const int64_t*>t.data
        return True
    if read_matrix(tensor, t, columns, INT_CODE, 32):
        ids32[0] = <const int32_t*>t.data
        return True
    return False


cdef struct Piece:   # a Managed, its shape, and the owner of the memory; NULL: the memory follows, aligned to 64 bytes
    Managed managed
    int64_t shape[2]
    int64_t strides[2]
    PyObject* owner


cdef void _let_go(Managed* managed) noexcept nogil:
    cdef Piece* piece = <Piece*>managed
    if piece.owner != NULL:
        with gil:
            Py_DECREF(<object>piece.owner)
    free(piece)


cdef object make_tensor(object owner, char* data, int code, int bits, int64_t rows, int64_t columns, char** place):
    """Make a tensor [rows, columns], or [rows] if columns is 0. Return None if torch cannot make it.

    It views `data` and keeps the owner alive; if data is NULL, it has memory of its own. The address is written to
    place unless that is NULL.
    """
    cdef Piece* piece = NULL
    cdef void* made = NULL
    cdef size_t head = (sizeof(Piece) + 63) // 64 * 64, size = rows * max(columns, 1) * (bits // 8)
    if posix_memalign(<void**>&piece, 64, head + (size if data == NULL else 0)) != 0:
        raise MemoryError(f"a tensor of {size} bytes")
    if data == NULL:
        data = <char*>piece + head
    if place != NULL:
        place[0] = data
    piece.managed.major, piece.managed.minor = 1, 0
    piece.managed.context, piece.managed.deleter, piece.managed.flags = NULL, _let_go, 0
    piece.shape[0], piece.shape[1] = rows, columns
    piece.strides[0], piece.strides[1] = max(columns, 1), 1
    cdef DLTensor* t = &piece.managed.tensor
    t.data, t.byte_offset = data, 0
    t.device_type, t.device_id, t.ndim = 1, 0, 2 if columns else 1
    t.dtype.code, t.dtype.bits, t.dtype.lanes = code, bits, 1
    t.shape, t.strides = piece.shape, piece.strides
    piece.owner = NULL
    if owner is not None:
        piece.owner = <PyObject*>owner
        Py_INCREF(owner)
    if _exchange.adopt(&piece.managed, &made) != 0:
        _let_go(&piece.managed)
        PyErr_Clear()
        return None
    tensor = <object>made
    Py_DECREF(tensor)   # drop the reference of adopt()
    return tensor


cdef object make_rows(object owner, char* data, const capi.Shape* shape, int64_t rows, char** place):
    """Make a tensor of rows of a buffer, as make_tensor."""
    return make_tensor(owner, data, _code_of(shape), _bits_of(shape), rows, shape.hidden, place)


cdef object copy_numbers(const int64_t* numbers, int n):
    """Make a tensor int64 [n] with a copy of these numbers."""
    cdef char* place = NULL
    tensor = make_tensor(None, NULL, INT_CODE, 64, n, 0, &place)
    if tensor is not None:
        memcpy(place, numbers, 8 * n)
    return tensor
