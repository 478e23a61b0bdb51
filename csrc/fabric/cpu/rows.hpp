// Row operations of the CPU: copies (ordinary or non-temporal), FP32 sums, quantization. One source is built
// for several instruction sets (AVX-512, AVX2 or NEON; baseline), and each build has several variants of the
// sum. All give the same bits. A process chooses one once: see rows_choice.hpp.
#pragma once
#include "base/terms.hpp"

namespace moecomm {

// dst = round(sum of terms, in their order, + bias) for elements [begin, end) of the row. next: the terms of
// the next sum, for variants that prefetch. stream: use non-temporal stores if the alignment of dst allows
// it.
using SumRows = void (*)(void* dst, const Terms& terms, const Terms* next, const float* bias, int64_t begin,
                         int64_t end, DType type, bool stream);

// A variant of the sum. In "BUILD/LINES", LINES is the number of cache lines of the destination that are
// summed at a time; "+next" prefetches the terms of the next sum.
struct SumVariant {
  const char* name;
  SumRows sum;
};
constexpr int kSumVariants = 6;  // of each build
constexpr int kFewTerms = 2;     // sums of at most this many terms have their own variant

struct RowKernels {
  const char* name;
  void (*copy)(void* dst, const void* src, uint64_t bytes);
  void (*stream)(void* dst, const void* src, uint64_t bytes);  // non-temporal stores; fence afterwards
  void (*zero)(void* dst, uint64_t bytes);
  void (*fence)();  // orders streamed stores before a signal
  SumVariant few, many;
  // The same sum in a wire format. Here and below `begin` is a multiple of kTile.
  void (*reduce_encode)(void* dst, Wire wire, const Terms& terms, const Terms* next, int64_t begin,
                        int64_t end, int64_t hidden, DType type);
  // Quantizes elements [begin, end) of a row to FP8 codes and scales (floats, or UE8M0 bytes, zero-padded to
  // whole int32).
  void (*quantize)(void* codes, void* scales, const void* row, int64_t begin, int64_t end, int64_t hidden,
                   DType type, ScaleKind kind);
  // Quantizes at most kTile whole rows, with a scale per column (128x1 tiles) or per kTile columns (128x128
  // tiles). Scales are floats.
  void (*quantize_block)(void* codes, float* scales, const void* rows, int64_t count, int64_t columns,
                         DType type, ScaleKind kind, bool square);
  // Dequantizes one row, with a scale per column or per kTile columns.
  void (*dequantize)(void* row, const void* codes, const float* scales, int64_t columns, DType type,
                     bool by_column);
  // Transposes at most kTile rows of 1x128 tiles. In dst each column has one scale for all rows of this
  // block.
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
// The kernels of a build ("avx2"), or of a build with one variant for all sums ("avx2/4+next"). Null if the
// machine cannot run them.
const RowKernels* row_kernels_named(const char* name);

}  // namespace moecomm
