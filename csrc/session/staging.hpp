// Combine reads rows and values in this rank's window, where peers can read them. What the caller has
// elsewhere is first copied to staging, behind the block that the dispatch delivered.
#pragma once
#include "session/arguments.hpp"

namespace moecomm {

// Offset of `p` in a window of `bytes` bytes, or -1.
inline int64_t offset_in(const char* window, uint64_t bytes, const void* p) {
  const char* c = static_cast<const char*>(p);
  return c >= window && c < window + bytes ? c - window : -1;
}

// The board of a combine. output: window offset of the staging memory. stage_rows(offset, rows, bytes) and
// stage_values(offset, floats, count) copy to it; they are called only if there is something to copy.
template <class StageRows, class StageValues>
RowsBoard place_rows(const BufferView& b, const CallShape& shape, const CombineCall& call, const char* window,
                     uint64_t output, uint64_t rows, StageRows stage_rows, StageValues stage_values) {
  const OutputLayout l = output_layout(rows, b.shape);
  int64_t at = offset_in(window, b.node.bytes, call.rows);
  if (at < 0) {
    at = static_cast<int64_t>(output + l.rows.value);
    if (rows) stage_rows(static_cast<uint64_t>(at), call.rows, rows * b.shape.combine_row_bytes());
  }
  const auto place = [&](const float* values, uint64_t count, Offset<float> staging) -> Offset<float> {
    if (!values) return {};
    if (const int64_t there = offset_in(window, b.node.bytes, values); there >= 0)
      return {static_cast<uint64_t>(there)};
    const Offset<float> to = staging.moved(output);
    if (count) stage_values(to.value, values, count);
    return to;
  };
  const uint64_t per_row = shape.layout == RowLayout::rank ? b.shape.top_k : 1;
  return make_board({static_cast<uint64_t>(at)}, place(call.weights, rows, l.weights),
                    place(call.back, rows * per_row, l.back), l.sums.moved(output));
}

}  // namespace moecomm
