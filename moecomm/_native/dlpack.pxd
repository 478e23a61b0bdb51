# Reading and making tensors by one C call each: DLPack's exchange table, which torch.Tensor carries
# from torch 2.10 on (https://dmlc.github.io/dlpack). Only what is read here is declared, in the standard's binary layout.
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
    int (*adopt)(Managed* tensor, void** out) noexcept   # a new tensor object that calls the deleter when its memory is let go
    int (*read)(void* tensor, DLTensor* out) noexcept   # valid while the tensor is; may be NULL
    void* current_stream
