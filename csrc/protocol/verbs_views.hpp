// Views of memory that the runtime owns, for the verbs of a Domain. Trivially copyable.
#pragma once
#include "base/domain_layout.hpp"
#include "base/shape.hpp"

namespace moecomm {

// Fixed for a Domain.
struct DomainView {
  Geometry geometry;
  DomainShape shape;
  DomainLayout at;

  MOE_HD bool same_node(int rank) const { return rank / geometry.ranks_per_node == geometry.node(); }
  MOE_HD int local_of(int rank) const { return rank % geometry.ranks_per_node; }
  MOE_HD int node_of(int rank) const { return rank / geometry.ranks_per_node; }
  // The counter `number` of `source` on a rank.
  MOE_HD CounterAt user(int source, int number) const {
    return at.user + (uint64_t(source) * shape.counters + number);
  }
  // The counter of one channel, among those of rank or node `which`.
  MOE_HD CounterAt of_channel(CounterAt first, int which, int channel) const {
    return first + (uint64_t(which) * shape.channels + channel);
  }
  // Offset of the slot for sum `number` of a node and channel, in `slots` or in `slots_out`.
  MOE_HD uint64_t slot_offset(int node, int channel, uint64_t number) const {
    return ((uint64_t(node) * shape.channels + channel) * shape.slots() + number % shape.slots()) *
           kSlotBytes;
  }
  // The gateway on a node for `rank` of another node: the rank on the same rail.
  MOE_HD int gateway(int node, int rank) const { return geometry.rank_at(node, local_of(rank)); }
};

inline DomainView make_domain_view(const Geometry& g, const DomainShape& s) {
  return DomainView{g, s, domain_layout(g, s)};
}

// Contiguous bytes: at an offset `there` of a peer's memory, and at an address `here` of this rank. A request
// is a list of segments.
struct Segment {
  uint64_t there = 0;
  char* here = nullptr;
  uint64_t bytes = 0;
};

struct Segments {
  const Segment* segment = nullptr;
  int64_t count = 0;
};

// The ranks that take part: sorted, distinct.
struct Ranks {
  const int32_t* rank = nullptr;
  int32_t count = 0;

  // The end of the ranks that are on the same node as the rank at index `first`.
  MOE_HD int32_t end_of_node(int32_t first, int ranks_per_node) const {
    int32_t i = first;
    while (i < count && rank[i] / ranks_per_node == rank[first] / ranks_per_node) ++i;
    return i;
  }
  MOE_HD bool contains(int r) const {
    for (int32_t i = 0; i < count; ++i)
      if (rank[i] == r) return true;
    return false;
  }
};

// A list of segments for many ranks. At the root `here` is the source; other ranks ignore it.
struct MulticastArgs {
  DomainView d;
  int root = 0;
  Ranks receivers;
  Segments segments;
  struct DomainConsumed* consumed = nullptr;  // [channels]
};

// Many ranks' segments for one rank. At the root `here` is the address of the sum; `there` has the
// contributions. A segment has at most kSlotBytes.
struct ReduceArgs {
  DomainView d;
  int root = 0;
  Ranks contributors;
  Segments segments;
  DType type = DType::f32;
  struct DomainConsumed* consumed = nullptr;  // [channels]
};

// Counter values that a channel of this rank has already consumed, and what it moved. Private to the rank;
// the values only grow.
struct DomainConsumed {
  uint64_t calls = 0;            // collective calls; used by the first channel only
  uint64_t* landed = nullptr;    // [size]
  uint64_t* summed = nullptr;    // [nodes]
  uint64_t* sent = nullptr;      // [nodes] sums to roots there
  uint64_t* released = nullptr;  // [ranks_per_node]
  uint64_t* link = nullptr;      // [size] bytes written to each rank, or read from it
};

}  // namespace moecomm
