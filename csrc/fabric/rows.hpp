// Row operations of the CPU: copies (ordinary or non-temporal) and FP32 reductions. Three builds of one
// source (AVX-512, AVX2, baseline) with equal bits; the best the machine has is chosen once.
#pragma once
#include "base/terms.hpp"

namespace moecomm {

struct RowKernels {
  const char* name;
  void (*copy)(void* dst, const void* src, uint64_t bytes);          // through the cache
  void (*stream)(void* dst, const void* src, uint64_t bytes);        // past the cache; fence afterwards
  void (*zero)(void* dst, uint64_t bytes);
  void (*fence)();                                                   // orders streamed stores before a signal
  // dst = round(sum of terms, in their order, + bias); elements [begin, end) of the row. Prefetches `next`.
  void (*reduce)(void* dst, const Terms& terms, const Terms* next, const float* bias, int64_t begin, int64_t end, DType type);
};

const RowKernels& row_kernels();
const RowKernels* row_kernels_named(const char* name);   // for tests; null where the machine lacks it

}  // namespace moecomm
