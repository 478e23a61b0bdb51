// Tools for benchmarks: the library's own packing and reduction, so that a baseline differs only in the
// transport; a comparison; and passes over memory.
#pragma once
#include <memory>

#include "base/terms.hpp"
#include "runtime/memory.hpp"

namespace moecomm {

// dst[i] = src[index[i]], rows of row_bytes.
void gather_rows(char* dst, const char* src, const int64_t* index, int64_t rows, uint64_t row_bytes,
                 bool stream);
// dst[t] = sum over j of weights[t, j] * src[index[t, j]] in FP32, ascending j; index -1 adds nothing;
// weights may be null.
void sum_rows(char* dst, const char* src, const int64_t* index, const float* weights, int64_t tokens,
              int terms, int64_t hidden, DType type);
// The number of elements of got[i] whose bits differ from want[index[i]], over all rows.
int64_t count_different(const char* got, const char* want, const int64_t* index, int64_t rows,
                        int64_t row_elements, int64_t element_bytes);

// Passes over memory that is allocated like a window. They measure the two rates from which the least time of
// a traffic pattern is computed.
class RateProbe {
 public:
  explicit RateProbe(int64_t bytes);  // whole rows of 14336 bytes are used
  int64_t bytes() const { return rows_ * kRow; }
  void write();     // non-temporal stores from a row in the cache
  uint64_t read();  // every byte loaded once

 private:
  static constexpr int64_t kRow = 14336;
  int64_t rows_;
  std::shared_ptr<Memory> memory_;
};

}  // namespace moecomm
