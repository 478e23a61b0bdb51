// The structures that travel or that peers read: all plain data, all offsets fixed.
#pragma once
#include "base/shape.hpp"

namespace moecomm {

// One expert pick of a token, as the gateway needs it. `ordinal` is the row's index among the rows of
// the same source for the same expert (expert layout) or the same rank (rank layout): with the
// receiver's prefix sums it is the final position, so any gateway lane can place any row.
struct Pick {
  uint16_t expert;   // within the destination node
  uint16_t k;        // which of the token's top-k slots
  int32_t ordinal;
  float weight;
};

// Travels beside every row on the rail. Picks are in ascending expert order, hence ascending rank.
struct RowMeta {
  int32_t token;
  int32_t picks;
  uint64_t checksum;
  // Pick pick[top_k] follows
  MOE_HD Pick* pick() { return reinterpret_cast<Pick*>(this + 1); }
  MOE_HD const Pick* pick() const { return reinterpret_cast<const Pick*>(this + 1); }
};
MOE_HD constexpr uint64_t meta_bytes(int top_k) { return align16(sizeof(RowMeta) + sizeof(Pick) * top_k); }

// Counts of one source for one node, travelling ahead of the rows (see CountBlock below for the order).
struct CountLayout {
  int32_t signature = 0;       // index of the call's signature
  int32_t cached = 1;          // 1 where the sender reuses a plan
  int32_t rows = 2;            // rows for the node: one per token that wants any of its experts
  int32_t experts = 0;         // first of num_experts / nodes counts
  int32_t ranks = 0;           // first of ranks_per_node counts (rows after rank-level dedup)
  int32_t channels = 0;        // first of `channels` row counts
  int32_t picks = 0;           // first of `logical_experts` counts: picks of the source, whatever replica will serve them
  int32_t ints = 0;            // length, a multiple of 4
};
struct alignas(16) FourInts { int32_t v[4]; };   // count blocks are copied so many at a time

MOE_HD constexpr CountLayout count_layout(const Geometry& g, const Shape& s) {
  CountLayout c;
  c.experts = 4;
  c.ranks = c.experts + s.num_experts / g.nodes();
  c.channels = c.ranks + g.ranks_per_node;
  c.picks = c.channels + s.channels;
  c.ints = (c.picks + s.logical_experts + 3) / 4 * 4;
  return c;
}

// What a rank offers its node peers at the start of a dispatch: two free pieces of its arena. The low
// one is used when the rows fit there (its pages are warm), else the largest one.
struct Offer {
  uint64_t offset[2] = {};
  uint64_t bytes[2] = {};
};

// What a rank tells its node peers at the start of a combine.
struct RowsBoard {
  uint64_t rows = 0;     // window offset of the experts' output
  uint64_t weights = 0;  // window offset of one f32 per row, 0: every weight is 1
  uint64_t back = 0;     // window offset of the f32 that go back to the picks' slots: [rows], or [rows, top_k] in the rank layout; 0: zeros
  uint64_t sums = 0;     // window offset of one checksum per row (read only when checks are on)
  uint64_t slots = 0;    // 1: values go back to the picks' slots in this call, 0: they do not; equal on all ranks
};

// The judgement of a node about a dispatch, sent over the rail behind the rows.
struct Verdict {
  int32_t code;
  int32_t rank;
  uint64_t needed;
  uint64_t available;
  uint64_t unused;
};

// Where a gateway put one pick of a row: kept in the handle for combine and for cached plans.
struct Place {
  int16_t local;   // destination's local rank
  uint16_t k;      // which of the token's top-k slots
  int32_t row;     // row in its block
};

// A failing rank writes this to everyone it reaches, so that nobody waits for the whole timeout.
struct FaultWord {
  uint64_t packed;   // 0: none; else code (8 bits), suspected rank + 1 (16), reporting rank + 1 (16), detail (24)
};
MOE_HD constexpr FaultWord pack_fault(const Status& s, int reporter) {
  return {static_cast<uint64_t>(s.code) | static_cast<uint64_t>(s.peer + 1) << 8 | static_cast<uint64_t>(reporter + 1) << 24 |
          static_cast<uint64_t>(s.detail) << 40};
}
MOE_HD constexpr Status unpack_fault(FaultWord w) {
  return {static_cast<Code>(w.packed & 0xff), Phase::none, static_cast<int32_t>(w.packed >> 8 & 0xffff) - 1, static_cast<int32_t>(w.packed >> 40), 0, 0,
          static_cast<int32_t>(w.packed >> 24 & 0xffff) - 1};
}

}  // namespace moecomm
