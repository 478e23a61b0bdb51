// Quantizes and dequantizes whole tensors on the current device, for moecomm.quant; see
// runtime/cpu/quant.hpp. All functions return a cudaError_t; `stream` is a cudaStream_t. Scales are floats,
// row-major (UE8M0 scales of 1x128 tiles: four in an int32).
#pragma once
#include "base/codes.hpp"

namespace moecomm::cuda {

int launch_quantize(char* codes, float* scales, const char* x, int64_t rows, int64_t columns, DType type,
                    TileShape tile, ScaleKind kind, void* stream);
int launch_dequantize(char* x, const char* codes, const float* scales, int64_t rows, int64_t columns,
                      DType type, TileShape tile, void* stream);
int launch_transpose_requantize(char* dst, float* dst_scales, const char* src, const float* src_scales,
                                int64_t rows, int64_t columns, ScaleKind kind, void* stream);
// Conversion to and from the wire formats of combine. The rows of x must be multiples of 16 bytes.
int launch_encode_rows(char* coded, const char* x, int64_t rows, int64_t hidden, DType type, Wire wire,
                       void* stream);
int launch_decode_rows(char* x, const char* coded, int64_t rows, int64_t hidden, DType type, Wire wire,
                       void* stream);

}  // namespace moecomm::cuda
