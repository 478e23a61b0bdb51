// Row operations of the CPU: copies (ordinary or non-temporal), FP32 sums, codes. Three builds of one source
// (AVX-512, AVX2 or NEON; baseline), and of each several variants of the sum. All have equal bits. Which one
// is used is decided once per process: see rows_choice.hpp.
#pragma once
#include "base/terms.hpp"

namespace moecomm {

// dst = round(sum of terms, in their order, + bias); elements [begin, end) of the row. `next`: the terms of
// the sum after this one, for variants that prefetch. `stream`: past the cache, where dst allows it.
using SumRows = void (*)(void* dst, const Terms& terms, const Terms* next, const float* bias, int64_t begin,
                         int64_t end, DType type, bool stream);

// One way to sum: "BUILD/LINES" walks the terms once per LINES cache lines; "+next" prefetches.
struct SumVariant {
  const char* name;
  SumRows sum;
};
constexpr int kSumVariants = 6;  // of each build
constexpr int kFewTerms = 2;     // sums of at most as many terms have a variant of their own

struct RowKernels {
  const char* name;
  void (*copy)(void* dst, const void* src, uint64_t bytes);    // through the cache
  void (*stream)(void* dst, const void* src, uint64_t bytes);  // past the cache; fence afterwards
  void (*zero)(void* dst, uint64_t bytes);
  void (*fence)();  // orders streamed stores before a signal
  SumVariant few, many;
  // The same sum, coded for the wire. Here and below `begin` is a multiple of kTile.
  void (*reduce_encode)(void* dst, Wire wire, const Terms& terms, const Terms* next, int64_t begin,
                        int64_t end, int64_t hidden, DType type);
  // FP8 codes and scales (floats, or UE8M0 bytes whose last int32 is filled up) of elements [begin, end) of a
  // row.
  void (*quantize)(void* codes, void* scales, const void* row, int64_t begin, int64_t end, int64_t hidden,
                   DType type, ScaleKind kind);
  // At most kTile whole rows: a scale per column (128x1 tiles), or per kTile columns (128x128 tiles). Scales
  // are floats.
  void (*quantize_block)(void* codes, float* scales, const void* rows, int64_t count, int64_t columns,
                         DType type, ScaleKind kind, bool square);
  // One row; a scale per column, or per kTile columns.
  void (*dequantize)(void* row, const void* codes, const float* scales, int64_t columns, DType type,
                     bool by_column);
  // At most kTile rows of 1x128 tiles; dst column by column: a scale for all of this block's rows in each.
  void (*transpose_requantize)(void* dst, float* dst_scales, const void* src, const float* src_scales,
                               int64_t count, int64_t columns, int64_t dst_stride, int64_t scale_stride,
                               ScaleKind kind);

  void reduce(void* dst, const Terms& terms, const Terms* next, const float* bias, int64_t begin, int64_t end,
              DType type, bool stream) const {
    (terms.count <= kFewTerms ? few : many).sum(dst, terms, next, bias, begin, end, type, stream);
  }
};

// This process's kernels.
const RowKernels& row_kernels();
// One build ("avx2"), or one with one variant for all sums ("avx2/4+next"). Null where the machine lacks it.
const RowKernels* row_kernels_named(const char* name);

}  // namespace moecomm
