// Whole tensors in and out of codes, for moecomm.quant: the row kernels over all rows. `isa` names a build
// of them; empty: the best one. Scales are floats, row-major. All return false where the machine lacks `isa`.
#pragma once
#include <string>

#include "base/codes.hpp"

namespace moecomm {

bool quantize(char* codes, float* scales, const char* x, int64_t rows, int64_t columns, DType type,
              TileShape tile, ScaleKind kind, const std::string& isa);
bool dequantize(char* x, const char* codes, const float* scales, int64_t rows, int64_t columns, DType type,
                TileShape tile, const std::string& isa);
// [rows, columns] in 1x128 tiles to [columns, rows] in 1x128 tiles, that is 128x1 tiles of the original.
bool transpose_requantize(char* dst, float* dst_scales, const char* src, const float* src_scales,
                          int64_t rows, int64_t columns, ScaleKind kind, const std::string& isa);
// Rows of combine's wire.
bool encode_rows(char* coded, const char* x, int64_t rows, int64_t hidden, DType type, Wire wire,
                 const std::string& isa);
bool decode_rows(char* x, const char* coded, int64_t rows, int64_t hidden, DType type, Wire wire,
                 const std::string& isa);

}  // namespace moecomm
