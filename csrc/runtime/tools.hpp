// The library's packing, reduction and memory rates, for benchmarks: a baseline that swaps only the
// transport packs and sums with the same code.
#pragma once
#include "base/terms.hpp"

namespace moecomm {

// dst[i] = src[index[i]], rows of row_bytes.
void gather_rows(char* dst, const char* src, const int64_t* index, int64_t rows, uint64_t row_bytes, bool stream);
// dst[t] = sum over j of weights[t, j] * src[index[t, j]] in FP32, ascending j; index -1 adds nothing;
// weights may be null.
void sum_rows(char* dst, const char* src, const int64_t* index, const float* weights, int64_t tokens, int terms, int64_t hidden, DType type);
// Bytes per second of streaming writes, and of reads, on this core: the traffic floor's two rates.
double write_rate(int64_t bytes, int repeats);
double read_rate(int64_t bytes, int repeats);

}  // namespace moecomm
