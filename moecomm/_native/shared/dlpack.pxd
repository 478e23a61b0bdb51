# The exchange table of DLPack, which torch.Tensor has since torch 2.10 (https://dmlc.github.io/dlpack). It reads and
# makes tensors with one C call each. The declarations have the binary layout of the standard, and only the fields that
# moecomm uses.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef struct DLDataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes


cdef struct DLTensor:
    void* data
    int32_t device_type     # 1: CPU
    int32_t device_id
    int32_t ndim
    DLDataType dtype
    int64_t* shape
    int64_t* strides
    uint64_t byte_offset


cdef struct Managed:
    uint32_t major
    uint32_t minor
    void* context
    void (*deleter)(Managed*) noexcept
    uint64_t flags
    DLTensor tensor


cdef struct ExchangeTable:
    uint32_t major
    uint32_t minor
    void* older
    void* allocate
    void* export_managed
    # Makes a tensor object, which calls the deleter when its memory is released.
    int (*adopt)(Managed* tensor, void** out) noexcept
    int (*read)(void* tensor, DLTensor* out) noexcept   # `out` is valid as long as the tensor; the function may be NULL
    void* current_stream
