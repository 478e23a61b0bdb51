// The arguments of a Domain's calls, in every world: rows of tensors, and their conversion to segments.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "protocol/verbs_multicast.hpp"
#include "protocol/verbs_reduce.hpp"

namespace moecomm {

// Rows of one length, with a stride on each side and an optional index.
struct Rows {
  uint64_t there = 0;  // offset in a peer's memory
  char* here = nullptr;
  uint64_t bytes = 0;  // of a row
  int64_t count = 0;
  int64_t there_stride = 0, here_stride = 0;  // bytes
  const int64_t* there_index = nullptr;       // [count], or null: 0, 1, ...
  const int64_t* here_index = nullptr;
};

// Divides rows into segments of at most `most` bytes.
inline std::vector<Segment> segments_of(const std::vector<Rows>& rows, uint64_t most) {
  std::vector<Segment> segments;
  for (const Rows& r : rows)
    for (int64_t i = 0; i < r.count; ++i) {
      const uint64_t there = r.there + (r.there_index ? r.there_index[i] : i) * r.there_stride;
      char* here = r.here ? r.here + (r.here_index ? r.here_index[i] : i) * r.here_stride : nullptr;
      for (uint64_t at = 0; at < r.bytes; at += most)
        segments.push_back({there + at, here ? here + at : nullptr, std::min(most, r.bytes - at)});
    }
  return segments;
}

// One multicast or reduction. A call may have several.
struct GroupCall {
  int32_t root = 0;
  std::vector<int32_t> ranks;  // sorted, distinct
  std::vector<Rows> rows;      // `here` is null except at the root
  DType type = DType::f32;     // of a reduction
};

// A hash of a call (FNV-1a): equal on all ranks that make the same call.
class Signature {
 public:
  void add(uint64_t word) {
    for (int i = 0; i < 8; ++i, word >>= 8) value_ = (value_ ^ (word & 0xff)) * 0x100000001b3ull;
  }
  void add(const GroupCall& call, const std::vector<Segment>& segments) {
    add(call.root);
    add(static_cast<uint64_t>(call.type));
    add(call.ranks.size());
    for (int32_t rank : call.ranks) add(rank);
    add(segments.size());
    for (const Segment& p : segments) {
      add(p.there);
      add(p.bytes);
    }
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325ull;
};

inline void set_group(MulticastArgs& a, Ranks ranks, DType) { a.receivers = ranks; }
inline void set_group(ReduceArgs& a, Ranks ranks, DType type) {
  a.contributors = ranks;
  a.type = type;
}

// The number of words behind a channel's DomainConsumed, and the DomainConsumed that points to them.
inline uint64_t consumed_words(const Geometry& g) { return 2 * g.size + 2 * g.nodes() + g.ranks_per_node; }
inline DomainConsumed make_consumed(const Geometry& g, uint64_t* words) {
  DomainConsumed consumed;
  consumed.landed = words;
  consumed.link = consumed.landed + g.size;
  consumed.summed = consumed.link + g.size;
  consumed.sent = consumed.summed + g.nodes();
  consumed.released = consumed.sent + g.nodes();
  return consumed;
}

// The DomainConsumed of a rank that has one channel.
class DomainCounts {
 public:
  explicit DomainCounts(const Geometry& g)
      : counts_(consumed_words(g)), consumed(make_consumed(g, counts_.data())) {}
  DomainCounts(const DomainCounts&) = delete;
  DomainCounts& operator=(const DomainCounts&) = delete;

 private:
  std::vector<uint64_t> counts_;

 public:
  DomainConsumed consumed;
};

}  // namespace moecomm
