# Tensors by one C call each; part of core. At a few tokens per call, asking a tensor's methods for pointer, shape and
# strides takes longer than the call itself.
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from libc.stdlib cimport free
from libc.string cimport memcpy
from posix.stdlib cimport posix_memalign

from moecomm._native.dlpack cimport DLTensor, ExchangeTable, Managed

# DLPack's type codes.
cdef enum:
    _INT = 0
    _FLOAT = 2
    _BFLOAT = 4

cdef object _tensor_type = None, _grad_enabled = None, _modes = None, _forward_ad = None
cdef ExchangeTable* _exchange = NULL


def read_tensors_of(tensor_type, grad_enabled, modes, forward_ad):
    """Name the tensor class whose objects are read without calling their methods, and what tells whether gradients are on, how
    many modes look at calls, and (._current_level) whether forward-mode AD is on. Whether that is possible."""
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


cdef bint _only_numbers(object a, object b):
    """Whether a call is the native one and nothing else: no gradient or tangent is wanted, no mode looks (ops.wanted, but for compilers)."""
    if _forward_ad._current_level >= 0:   # a tensor may have a tangent
        return False
    if (getattr(a, "requires_grad", False) or getattr(b, "requires_grad", False)) and _grad_enabled():
        return False
    return _modes() == 0


cdef bint _empty(const DLTensor* t) noexcept:
    """Whether it has no elements."""
    cdef int i
    for i in range(t.ndim):
        if t.shape[i] == 0:
            return True
    return False


cdef bint _read(object tensor, DLTensor* t, int64_t columns, int code, int bits):
    """Whether it is a contiguous matrix on the CPU, of that many columns and that type."""
    if _exchange == NULL or type(tensor) is not _tensor_type:
        return False
    if code != _INT and tensor.is_neg():   # the sign is not in its memory
        return False
    if _exchange.read(<void*>tensor, t) != 0:
        PyErr_Clear()
        return False
    if t.data == NULL and not _empty(t):   # a freed storage: moecomm.tensors names it
        return False
    t.data = <char*>t.data + t.byte_offset
    return (t.device_type == 1 and t.ndim == 2 and t.dtype.code == code and t.dtype.bits == bits and t.shape[1] == columns
            and (t.strides == NULL or t.shape[0] == 0 or (t.strides[1] == 1 and (t.shape[0] == 1 or t.strides[0] == columns))))


cdef bint _apart(const void* a, uint64_t a_bytes, const void* b, uint64_t b_bytes) noexcept:
    """Whether two pieces of memory share no byte."""
    return <uintptr_t>a + a_bytes <= <uintptr_t>b or <uintptr_t>b + b_bytes <= <uintptr_t>a


cdef struct Extent:   # some memory
    const char* data
    uint64_t size


cdef struct Windows:   # what peers read: of the buffer itself, and of its decode path (empty where there is none)
    Extent own
    Extent decode


cdef Extent _extent(const capi.Memory& memory) noexcept:
    cdef Extent e
    e.data, e.size = memory.data(), memory.bytes()
    return e


cdef bint _outside(const Windows& windows, const void* data, uint64_t size) noexcept:
    """Whether memory shares no byte with the windows."""
    return _apart(data, size, windows.own.data, windows.own.size) and _apart(data, size, windows.decode.data, windows.decode.size)


cdef int _code_of(const capi.Shape* shape):
    return _BFLOAT if shape.dtype == capi.DType.bf16 else _FLOAT


cdef int _bits_of(const capi.Shape* shape):
    return 64 if shape.dtype == capi.DType.f64 else 32 if shape.dtype == capi.DType.f32 else 16


cdef bint _read_rows(object tensor, DLTensor* t, const capi.Shape* shape):
    """Whether it is such a matrix of a buffer's rows."""
    return _read(tensor, t, shape.hidden, _code_of(shape), _bits_of(shape))


cdef bint _read_vector(object tensor, DLTensor* t, int64_t length):
    """Whether it is a contiguous vector of that many floats on the CPU."""
    if _exchange == NULL or type(tensor) is not _tensor_type or tensor.is_neg():
        return False
    if _exchange.read(<void*>tensor, t) != 0:
        PyErr_Clear()
        return False
    if t.data == NULL and not _empty(t):
        return False
    t.data = <char*>t.data + t.byte_offset
    return (t.device_type == 1 and t.ndim == 1 and t.dtype.code == _FLOAT and t.dtype.bits == 32 and t.shape[0] == length
            and (t.strides == NULL or length <= 1 or t.strides[0] == 1))


cdef bint _read_ids(object tensor, DLTensor* t, int64_t columns, const int64_t** ids64, const int32_t** ids32):
    """Whether it is such a matrix of int64 or int32."""
    if _read(tensor, t, columns, _INT, 64):
        ids64[0] = <const int64_t*>t.data
        return True
    if _read(tensor, t, columns, _INT, 32):
        ids32[0] = <const int32_t*>t.data
        return True
    return False


cdef struct Piece:   # a Managed, its shape, and what keeps the memory; NULL: the memory follows, on 64 bytes
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


cdef object _tensor_at(object owner, char* data, int code, int bits, int64_t rows, int64_t columns, char** place=NULL):
    """A tensor [rows, columns], or [rows] where columns is 0: of memory that lives as long as owner does, or (data is NULL) its own.
    Where that lies goes to place."""
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
    piece.managed.tensor.data = data
    piece.managed.tensor.device_type, piece.managed.tensor.device_id, piece.managed.tensor.ndim = 1, 0, 2 if columns else 1
    piece.managed.tensor.dtype.code, piece.managed.tensor.dtype.bits, piece.managed.tensor.dtype.lanes = code, bits, 1
    piece.shape[0], piece.shape[1] = rows, columns
    piece.strides[0], piece.strides[1] = max(columns, 1), 1
    piece.managed.tensor.shape, piece.managed.tensor.strides, piece.managed.tensor.byte_offset = piece.shape, piece.strides, 0
    piece.owner = NULL
    if owner is not None:
        piece.owner = <PyObject*>owner
        Py_INCREF(owner)
    if _exchange.adopt(&piece.managed, &made) != 0:
        _let_go(&piece.managed)
        PyErr_Clear()
        return None
    tensor = <object>made
    Py_DECREF(tensor)   # the call's own reference
    return tensor


cdef object _rows_at(object owner, char* data, const capi.Shape* shape, int64_t rows, char** place=NULL):
    """Such a tensor of a buffer's rows."""
    return _tensor_at(owner, data, _code_of(shape), _bits_of(shape), rows, shape.hidden, place)


cdef object _copied(const int64_t* numbers, int n):
    """A tensor int64 [n] of its own."""
    cdef char* place = NULL
    tensor = _tensor_at(None, NULL, _INT, 64, n, 0, &place)
    if tensor is not None:
        memcpy(place, numbers, 8 * n)
    return tensor
