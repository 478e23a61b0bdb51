// The rows that make one output row, in the order in which they are added.
#pragma once
#include "base/shape.hpp"

namespace moecomm {

// Terms are added in FP32 (FP64 for f64 rows): within a group first, then group to group. A group is a
// node's contribution; grouping keeps the sum independent of which rank computes it.
struct Terms {
  static constexpr int kMax = 2 * kMaxTopK;
  int count = 0;
  uint64_t group_end = 0;   // bit i: term i closes its group
  const void* row[kMax];
  float weight[kMax];

  MOE_HD void clear() { count = 0; group_end = 0; }
  MOE_HD void add(const void* r, float w) { row[count] = r; weight[count] = w; ++count; }
  MOE_HD void close_group() { if (count > 0) group_end |= uint64_t{1} << (count - 1); }
};

}  // namespace moecomm
