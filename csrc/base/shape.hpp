// What a Buffer is built for, and what one call of dispatch is about.
#pragma once
#include "base/types.hpp"

namespace moecomm {

constexpr int kMaxTopK = 32;
constexpr int kMaxChannels = 64;

// Fixed for the life of a Buffer, equal on every rank.
struct Shape {
  int64_t hidden = 0;
  DType dtype = DType::bf16;
  int32_t num_experts = 0;
  int32_t top_k = 0;
  int32_t max_tokens = 0;   // per rank
  int32_t channels = 1;     // independent slices of the tokens
  uint64_t arena_bytes = 0;

  MOE_HD constexpr uint64_t combine_row_bytes() const { return hidden * element_bytes(dtype); }
  // FP8 rows carry one f32 scale per 128 channels.
  MOE_HD constexpr uint64_t scale_bytes() const { return (hidden + 127) / 128 * 4; }
  MOE_HD constexpr uint64_t fp8_row_bytes() const { return align16(hidden) + align16(scale_bytes()); }
  // A rail slot holds either kind of row.
  MOE_HD constexpr uint64_t slot_bytes() const {
    const uint64_t a = align16(combine_row_bytes()), b = fp8_row_bytes();
    return a > b ? a : b;
  }
};

// One dispatch call's own arguments that every rank must give alike.
struct CallShape {
  RowLayout layout = RowLayout::expert;
  int32_t alignment = 1;    // each expert's rows are padded to a multiple of this
  int64_t capacity = -1;    // static number of rows, -1: as many as arrive
  uint64_t row_bytes = 0;   // payload of one row
  uint64_t scale_bytes = 0; // 0: not quantized

  MOE_HD constexpr int32_t signature() const {
    return static_cast<int32_t>((layout == RowLayout::rank ? 1 : 0) + 2 * alignment + 257 * (capacity + 1) +
                                65537 * static_cast<int64_t>(row_bytes) + 31 * static_cast<int64_t>(scale_bytes));
  }
};

}  // namespace moecomm
