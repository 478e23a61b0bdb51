// The rows that are summed to one output row, in the order in which they are added.
#pragma once
#include "base/shape.hpp"

namespace moecomm {

// The memory of a list of terms. It belongs to the group that builds the list, and the fabric provides it (on
// a GPU: shared memory, since arrays that are private to a lane are slow if they are indexed).
struct TermStore {
  static constexpr int kMax = 2 * kMaxTopK;
  const void* row[kMax];
  float weight[kMax];
};

// Terms are added in FP32 (FP64 for f64 rows): first within a group of terms, then group to group. A group of
// terms is a node's contribution; grouping makes the sum independent of which rank computes it. Every lane
// holds an equal view of one store. The lanes fill it together and sync before it is read.
struct Terms {
  TermStore* store = nullptr;
  int count = 0;
  uint64_t group_end = 0;  // bit i: term i closes its group
  uint64_t coded = 0;      // bit i: row i has the format `wire` (one per list) and `hidden` elements
  Wire wire = Wire::plain;
  int64_t hidden = 0;
  const float* unread = nullptr;  // address of this lane's latest weight, not loaded yet
  int unread_at = 0;

  // Term i is written by lane i mod size; only that lane evaluates its weight.
  template <class G, class Weight>
  MOE_HD void add(G g, const void* row, Weight&& weight) {
    if (count % g.size() == g.lane()) {
      store->row[count] = row;
      store->weight[count] = weight();
    }
    ++count;
  }
  // weight: may be in a peer's memory; null: the weight is 1. It is not loaded here: fetch_weights() loads
  // the weights of all lanes together once the list is complete, so that their latencies overlap.
  template <class G>
  MOE_HD void add_weighted(G g, const void* row, const float* weight) {
    if (count % g.size() == g.lane()) {
      fetch_weights();  // of an earlier term, if the list has more terms than the group has lanes
      store->row[count] = row;
      if (weight == nullptr) store->weight[count] = 1.0f;
      unread = weight;
      unread_at = count;
    }
    ++count;
  }
  MOE_HD void fetch_weights() {
    if (unread) store->weight[unread_at] = *unread;
    unread = nullptr;
  }
  // A row in its wire format, as it crossed the rail.
  template <class G>
  MOE_HD void add_wire(G g, const void* row, Wire format, int64_t elements, const float* weight = nullptr) {
    if (format != Wire::plain) coded |= uint64_t{1} << count;
    wire = format;
    hidden = elements;
    add_weighted(g, row, weight);
  }
  MOE_HD void close_group() {
    if (count > 0) group_end |= uint64_t{1} << (count - 1);
  }
};

}  // namespace moecomm
