// Whole tensors in and out of codes on the current device, for moecomm.quant. As runtime/cpu/quant.hpp; all
// return a cudaError_t, `stream` is a cudaStream_t. Scales are floats, row-major (UE8M0 rows of 1x128 tiles:
// four to an int32).
#pragma once
#include "base/codes.hpp"

namespace moecomm::cuda {

int launch_quantize(char* codes, float* scales, const char* x, int64_t rows, int64_t columns, DType type,
                    TileShape tile, ScaleKind kind, void* stream);
int launch_dequantize(char* x, const char* codes, const float* scales, int64_t rows, int64_t columns,
                      DType type, TileShape tile, void* stream);
int launch_transpose_requantize(char* dst, float* dst_scales, const char* src, const float* src_scales,
                                int64_t rows, int64_t columns, ScaleKind kind, void* stream);
// Rows of combine's wire; x is a multiple of 16 bytes per row.
int launch_encode_rows(char* coded, const char* x, int64_t rows, int64_t hidden, DType type, Wire wire,
                       void* stream);
int launch_decode_rows(char* x, const char* coded, int64_t rows, int64_t hidden, DType type, Wire wire,
                       void* stream);

}  // namespace moecomm::cuda
