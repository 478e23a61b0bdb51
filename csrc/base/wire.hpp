// The structures that travel or that peers read: all plain data, all offsets fixed.
#pragma once
#include "base/offset.hpp"
#include "base/shape.hpp"

namespace moecomm {

// One expert pick of a token, as the gateway needs it. `ordinal` is the row's index among the rows of
// the same source for the same expert (expert layout) or the same rank (rank layout): with the
// receiver's prefix sums it is the final position, so any gateway lane can place any row.
struct Pick {
  uint16_t expert;  // within the destination node
  uint16_t k;       // which of the token's top-k slots
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

// Counts of one source for one node, travelling ahead of the rows in this order.
struct CountLayout {
  int32_t signature = 0;  // index of the call's signature
  int32_t cached = 1;     // 1 where the sender reuses a plan; -Why where it refuses its part in the call
  int32_t rows = 2;       // rows for the node: one per token that wants any of its experts
  int32_t word = 3;       // index of the call's word: its number and verb
  int32_t experts = 0;    // first of num_experts / nodes counts
  int32_t ranks = 0;      // first of ranks_per_node counts (rows after rank-level dedup)
  int32_t channels = 0;   // first of `channels` row counts
  int32_t picks =
      0;  // first of `logical_experts` counts: picks of the source, whatever replica will serve them
  int32_t ints = 0;  // length, a multiple of 4
};

// All lanes: a count block, 16 bytes at a time.
template <class G>
MOE_HD void copy_block(G g, int32_t* to, const int32_t* from, int64_t ints) {
  struct alignas(16) FourInts {
    int32_t v[4];
  };
  for (int64_t i = g.lane(); i < ints / 4; i += g.size())
    reinterpret_cast<FourInts*>(to)[i] = reinterpret_cast<const FourInts*>(from)[i];
}

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
  // Window offsets; 0: there are none.
  Offset<char> rows;      // the experts' output
  Offset<float> weights;  // [rows]; none: every weight is 1
  Offset<float> back;     // what goes back to the picks' slots: [rows], or [rows, top_k] in the rank layout;
                          // none: zeros
  Offset<uint64_t> sums;  // checksum [rows] (read only when checks are on)
  uint64_t slots = 0;     // 1: values go back to the picks' slots in this call, 0: they do not; equal on all
                          // ranks
  uint64_t word = 0;      // of the call
  uint64_t refused = 0;   // Why, where the rank refuses its part
};

// What a rank tells its rail peers in a combine, when all ranks of its node have published: what it wants,
// and its node's judgement.
struct Wish {
  int32_t word;      // of the call
  uint16_t rank;     // where code is not ok: the rank that is meant
  uint8_t code : 4;  // Code of the node: ok, or refused, or mismatch
  uint8_t why : 4;   // Why
  uint8_t wire : 4;  // Wire in which it wants its rows back
 uint8_t slots : 4;  // 1: values go back to the picks' slots
};
static_assert(sizeof(Wish) == 8);

// Which verb a call is, beside its number, in the word by which ranks know that they make the same call.
enum class Verb : int32_t {
  dispatch = 0,
  choose = 1,
  combine = 2,
  decode_dispatch = 3,
  decode_combine = 4,
  refused_late = 14,
  unknown = 15
};

// Of the first three. `number`: announcements and combines of the Buffer so far. Only compared for equality.
MOE_HD constexpr int32_t call_word(uint64_t number, Verb verb) {
  return static_cast<int32_t>(static_cast<uint32_t>(number << 2) | static_cast<uint32_t>(verb));
}
MOE_HD constexpr Verb verb_of(int32_t word) { return static_cast<Verb>(word & 3); }
// The detail of an `out_of_step` status.
MOE_HD constexpr int32_t verbs_detail(Verb own, Verb theirs) {
  return static_cast<int32_t>(own) | static_cast<int32_t>(theirs) << 4;
}

// The judgement of a node about a dispatch, sent over the rail behind the rows.
struct Verdict {
  int32_t code;
  int32_t rank;
  uint64_t needed;
  uint64_t available;
  uint64_t detail;
};
MOE_HD constexpr Status status_of(const Verdict& v) {
  return {static_cast<Code>(v.code),      Phase::counts, v.rank,
          static_cast<int32_t>(v.detail), v.needed,      v.available};
}

// Where a gateway put one pick of a row: kept in the handle for combine and for cached plans.
struct Place {
  int16_t local;  // destination's local rank
  uint16_t k;     // which of the token's top-k slots
  int32_t row;    // row in its block
};

// A failing rank writes this to everyone it reaches, so that nobody waits for the whole timeout.
struct FaultWord {
  uint64_t
      packed;  // 0: none; else code (8 bits), suspected rank + 1 (16), reporting rank + 1 (16), detail (24)
};
MOE_HD constexpr FaultWord pack_fault(const Status& s, int reporter) {
  return {static_cast<uint64_t>(s.code) | static_cast<uint64_t>(s.peer + 1) << 8 |
          static_cast<uint64_t>(reporter + 1) << 24 | static_cast<uint64_t>(s.detail) << 40};
}
// In the same place: "I wait, in this call": its verb, the memory that it is on and its number among the
// communicator's calls. Not a fault.
constexpr uint64_t kWaitsCode = 0xff;
MOE_HD constexpr uint64_t waiting_word(Verb verb, uint64_t memory, uint64_t number) {
  return kWaitsCode | static_cast<uint64_t>(verb) << 8 | (memory & 0xfff) << 12 | number << 24;
}
MOE_HD constexpr bool is_waiting(uint64_t word) { return (word & 0xff) == kWaitsCode; }
MOE_HD constexpr uint64_t number_of_waiting(uint64_t word) { return word >> 24; }
MOE_HD constexpr Verb verb_of_waiting(uint64_t word) { return static_cast<Verb>(word >> 8 & 15); }
MOE_HD constexpr Status unpack_fault(FaultWord w) {
  return {static_cast<Code>(w.packed & 0xff),
          Phase::none,
          static_cast<int32_t>(w.packed >> 8 & 0xffff) - 1,
          static_cast<int32_t>(w.packed >> 40),
          0,
          0,
          static_cast<int32_t>(w.packed >> 24 & 0xffff) - 1};
}

}  // namespace moecomm
