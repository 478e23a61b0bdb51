// The fixed parameters of a Buffer, and the parameters of one dispatch.
#pragma once
#include "base/codes.hpp"

namespace moecomm {

constexpr int kMaxTopK = 32;
constexpr int kMaxChannels = 1024;

// Fixed for the life of a Buffer, equal on every rank.
struct Shape {
  int64_t hidden = 0;
  DType dtype = DType::bf16;
  int32_t num_experts = 0;
  int32_t top_k = 0;
  int32_t max_tokens = 0;   // per rank
  int32_t channels = 1;     // independent slices of the tokens
  int32_t chunk_rows = 16;  // rows per rail signal: enough to amortize it, few enough to pipeline the hops.
                            // May differ between ranks
  uint64_t arena_bytes = 0;
  int32_t logical_experts = 0;  // number of logical experts, if replicas are chosen by the counts of all
                                // ranks; else 0

  // Copies of the memory for count blocks: a call with logical experts exchanges counts twice.
  MOE_HD constexpr int count_halves() const { return logical_experts ? 2 : 1; }
  MOE_HD constexpr uint64_t combine_row_bytes() const { return hidden * element_bytes(dtype); }
  // The most bytes of scales that an FP8 row has.
  MOE_HD constexpr uint64_t scale_bytes() const { return 4 * scale_words(hidden, ScaleKind::f32); }
  MOE_HD constexpr uint64_t wire_bytes(Wire wire) const { return wire_row_bytes(wire, hidden, dtype); }
  // A stage slot has room for a row of any format. An FP8 row of dispatch is at most as long as one of
  // combine.
  MOE_HD constexpr uint64_t slot_bytes() const {
    const uint64_t a = align16(combine_row_bytes()), b = wire_bytes(Wire::fp8),
                   c = wire_bytes(Wire::logfmt10);
    return a > b ? (a > c ? a : c) : (b > c ? b : c);
  }
};

// The arguments of one dispatch call that must be equal on all ranks.
struct CallShape {
  RowLayout layout = RowLayout::expert;
  int32_t alignment = 1;     // each expert's rows are padded to a multiple of this
  int64_t capacity = -1;     // fixed number of rows; -1: as many as arrive
  uint64_t row_bytes = 0;    // payload of one row
  uint64_t scale_bytes = 0;  // 0: not quantized
  ScaleKind scales = ScaleKind::none;
  bool scales_by_column = false;  // in the block: [scale][row], columns 16-byte aligned; else [row][scale]
  uint32_t routing = 0;           // identifies the placement and its layer; 0: no placement

  MOE_HD constexpr int32_t signature() const {
    return static_cast<int32_t>((layout == RowLayout::rank ? 1 : 0) + 2 * alignment + 257 * (capacity + 1) +
                                65537 * static_cast<int64_t>(row_bytes) +
                                31 * static_cast<int64_t>(scale_bytes) + 8191 * static_cast<int64_t>(scales) +
                                (scales_by_column ? 32771 : 0) + 131101 * static_cast<int64_t>(routing));
  }
};

}  // namespace moecomm
