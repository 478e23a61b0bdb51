// The rows that make one output row, in the order in which they are added.
#pragma once
#include "base/shape.hpp"

namespace moecomm {

// Where a list lies: memory of the group that builds it, given by the fabric (a GPU's lanes have no
// indexable memory of their own that is fast).
struct TermStore {
  static constexpr int kMax = 2 * kMaxTopK;
  const void* row[kMax];
  float weight[kMax];
};

// Terms are added in FP32 (FP64 for f64 rows): within a group first, then group to group. A group is a
// node's contribution; grouping keeps the sum independent of which rank computes it. Every lane holds an
// equal view of one store; the lanes fill it together and meet (sync) before it is read.
struct Terms {
  TermStore* store = nullptr;
  int count = 0;
  uint64_t group_end = 0;  // bit i: term i closes its group
  uint64_t coded = 0;  // bit i: row i is coded as `wire` says (one format in a list), `hidden` elements long
  Wire wire = Wire::plain;
  int64_t hidden = 0;

  // Term i is written by lane i mod size; only that lane evaluates its weight.
  template <class G, class Weight>
  MOE_HD void add(G g, const void* row, Weight&& weight) {
    if (count % g.size() == g.lane()) {
      store->row[count] = row;
      store->weight[count] = weight();
    }
    ++count;
  }
  // A row as it crossed the rail.
  template <class G>
  MOE_HD void add_wire(G g, const void* row, Wire format, int64_t elements) {
    add_wire(g, row, format, elements, [] { return 1.0f; });
  }
  template <class G, class Weight>
  MOE_HD void add_wire(G g, const void* row, Wire format, int64_t elements, Weight&& weight) {
    if (format != Wire::plain) coded |= uint64_t{1} << count;
    wire = format;
    hidden = elements;
    add(g, row, weight);
  }
  MOE_HD void close_group() {
    if (count > 0) group_end |= uint64_t{1} << (count - 1);
  }
};

}  // namespace moecomm
