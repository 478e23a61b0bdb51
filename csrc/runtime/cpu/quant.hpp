// Quantizes and dequantizes whole tensors with the row kernels, for moecomm.quant. isa: the name of a build
// of the kernels; empty: the best one. Scales are floats, row-major. All functions return false if the
// machine cannot run `isa`.
#pragma once
#include <string>

#include "base/codes.hpp"

namespace moecomm {

bool quantize(char* codes, float* scales, const char* x, int64_t rows, int64_t columns, DType type,
              TileShape tile, ScaleKind kind, const std::string& isa);
bool dequantize(char* x, const char* codes, const float* scales, int64_t rows, int64_t columns, DType type,
                TileShape tile, const std::string& isa);
// Converts [rows, columns] in 1x128 tiles to [columns, rows] in 1x128 tiles, which are 128x1 tiles of the
// original.
bool transpose_requantize(char* dst, float* dst_scales, const char* src, const float* src_scales,
                          int64_t rows, int64_t columns, ScaleKind kind, const std::string& isa);
// Conversion to and from the wire formats of combine.
bool encode_rows(char* coded, const char* x, int64_t rows, int64_t hidden, DType type, Wire wire,
                 const std::string& isa);
bool decode_rows(char* x, const char* coded, int64_t rows, int64_t hidden, DType type, Wire wire,
                 const std::string& isa);

}  // namespace moecomm
