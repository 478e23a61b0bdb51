# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Quantization of whole tensors: convert arguments, release the GIL, make one call.

moecomm.quant documents and validates.
"""
from libc.stdint cimport int64_t, uintptr_t
from libcpp cimport bool
from libcpp.string cimport string

from moecomm._native.capi cimport DType, ScaleKind, Wire

cdef extern from "base/codes.hpp" namespace "moecomm" nogil:
    long long c_scale_words "moecomm::scale_words"(int64_t hidden, ScaleKind kind)
    unsigned long long c_wire_row_bytes "moecomm::wire_row_bytes"(Wire wire, int64_t hidden, DType type)

cdef extern from "runtime/cpu/quant.hpp" namespace "moecomm" nogil:
    cdef enum class TileShape(int):
        row
        column
        square

    bool c_quantize "moecomm::quantize"(char* codes, float* scales, const char* x, int64_t rows, int64_t columns,
                                        DType type, TileShape tile, ScaleKind kind, const string& isa)
    bool c_dequantize "moecomm::dequantize"(char* x, const char* codes, const float* scales, int64_t rows,
                                            int64_t columns, DType type, TileShape tile, const string& isa)
    bool c_transpose_requantize "moecomm::transpose_requantize"(
        char* dst, float* dst_scales, const char* src, const float* src_scales, int64_t rows, int64_t columns,
        ScaleKind kind, const string& isa)
    bool c_encode_rows "moecomm::encode_rows"(char* coded, const char* x, int64_t rows, int64_t hidden, DType type,
                                              Wire wire, const string& isa)
    bool c_decode_rows "moecomm::decode_rows"(char* x, const char* coded, int64_t rows, int64_t hidden, DType type,
                                              Wire wire, const string& isa)


def scale_words(int64_t hidden, int kind):
    """Return the number of 32-bit words of a row's scales."""
    return c_scale_words(hidden, <ScaleKind>kind)


def wire_row_bytes(int wire, int64_t hidden, int dtype):
    """Return the bytes of a row on the wire of combine."""
    return c_wire_row_bytes(<Wire>wire, hidden, <DType>dtype)


def quantize(uintptr_t codes, uintptr_t scales, uintptr_t x, int64_t rows, int64_t columns, int dtype, int tile,
             int kind, str isa):
    """Return False if the machine does not support `isa` (empty: the best one)."""
    cdef string name = isa.encode()
    cdef bool there
    with nogil:
        there = c_quantize(<char*>codes, <float*>scales, <const char*>x, rows, columns, <DType>dtype, <TileShape>tile,
                           <ScaleKind>kind, name)
    return there


def dequantize(uintptr_t x, uintptr_t codes, uintptr_t scales, int64_t rows, int64_t columns, int dtype, int tile,
               str isa):
    """Return False if the machine does not support `isa`."""
    cdef string name = isa.encode()
    cdef bool there
    with nogil:
        there = c_dequantize(<char*>x, <const char*>codes, <const float*>scales, rows, columns, <DType>dtype,
                             <TileShape>tile, name)
    return there


def transpose_requantize(uintptr_t dst, uintptr_t dst_scales, uintptr_t src, uintptr_t src_scales, int64_t rows,
                         int64_t columns, int kind, str isa):
    """Return False if the machine does not support `isa`."""
    cdef string name = isa.encode()
    cdef bool there
    with nogil:
        there = c_transpose_requantize(<char*>dst, <float*>dst_scales, <const char*>src, <const float*>src_scales,
                                       rows, columns, <ScaleKind>kind, name)
    return there


def encode_rows(uintptr_t coded, uintptr_t x, int64_t rows, int64_t hidden, int dtype, int wire, str isa):
    """Return False if the machine does not support `isa`."""
    cdef string name = isa.encode()
    cdef bool there
    with nogil:
        there = c_encode_rows(<char*>coded, <const char*>x, rows, hidden, <DType>dtype, <Wire>wire, name)
    return there


def decode_rows(uintptr_t x, uintptr_t coded, int64_t rows, int64_t hidden, int dtype, int wire, str isa):
    """Return False if the machine does not support `isa`."""
    cdef string name = isa.encode()
    cdef bool there
    with nogil:
        there = c_decode_rows(<char*>x, <const char*>coded, rows, hidden, <DType>dtype, <Wire>wire, name)
    return there
