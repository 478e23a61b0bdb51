# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Quantization of whole tensors on the current device, as in moecomm._native.quant. All enqueue on `stream`."""
from libc.stdint cimport int64_t, uintptr_t

from moecomm._native cimport capi, cudaapi


cdef _started(int error):
    if error:
        raise RuntimeError((<bytes>cudaapi.error_text(error)).decode())


def quantize(uintptr_t codes, uintptr_t scales, uintptr_t x, int64_t rows, int64_t columns, int dtype, int tile,
             int kind, uintptr_t stream):
    """Write the codes and scales of a matrix."""
    _started(cudaapi.launch_quantize(<char*>codes, <float*>scales, <const char*>x, rows, columns, <capi.DType>dtype,
                                     <cudaapi.TileShape>tile, <capi.ScaleKind>kind, <void*>stream))


def dequantize(uintptr_t x, uintptr_t codes, uintptr_t scales, int64_t rows, int64_t columns, int dtype, int tile,
               uintptr_t stream):
    """Write the values of codes."""
    _started(cudaapi.launch_dequantize(<char*>x, <const char*>codes, <const float*>scales, rows, columns,
                                       <capi.DType>dtype, <cudaapi.TileShape>tile, <void*>stream))


def transpose_requantize(uintptr_t dst, uintptr_t dst_scales, uintptr_t src, uintptr_t src_scales, int64_t rows,
                         int64_t columns, int kind, uintptr_t stream):
    """Write the transposed matrix in tiles of 1x128."""
    _started(cudaapi.launch_transpose_requantize(<char*>dst, <float*>dst_scales, <const char*>src,
                                                 <const float*>src_scales, rows, columns, <capi.ScaleKind>kind,
                                                 <void*>stream))


def encode_rows(uintptr_t coded, uintptr_t x, int64_t rows, int64_t hidden, int dtype, int wire, uintptr_t stream):
    """Encode rows for the wire of combine."""
    _started(cudaapi.launch_encode_rows(<char*>coded, <const char*>x, rows, hidden, <capi.DType>dtype,
                                        <capi.Wire>wire, <void*>stream))


def decode_rows(uintptr_t x, uintptr_t coded, int64_t rows, int64_t hidden, int dtype, int wire, uintptr_t stream):
    """Decode such rows."""
    _started(cudaapi.launch_decode_rows(<char*>x, <const char*>coded, rows, hidden, <capi.DType>dtype,
                                        <capi.Wire>wire, <void*>stream))
