// The structures that are sent to peers or read by them. All are plain data with fixed offsets.
#pragma once
#include "base/offset.hpp"
#include "base/shape.hpp"

namespace moecomm {

// One expert pick of a token, as the gateway needs it. `ordinal` is the row's index among the rows of
// the same source for the same expert (expert layout) or the same rank (rank layout): with the
// receiver's prefix sums it is the final position, so any gateway lane can place any row.
struct Pick {
  uint16_t expert;  // within the destination node
  uint16_t k;       // index among the token's top_k picks
  int32_t ordinal;
  float weight;
};

// The metadata of a row, sent with it over the rail. Picks are in ascending expert order, hence in ascending
// rank order.
struct RowMeta {
  int32_t token;
  int32_t picks;
  uint64_t checksum;
  // Pick pick[top_k] follows
  MOE_HD Pick* pick() { return as<Pick>(bytes_of(this + 1)); }
  MOE_HD const Pick* pick() const { return as<Pick>(bytes_of(this + 1)); }
};
MOE_HD constexpr uint64_t meta_bytes(int top_k) { return align16(sizeof(RowMeta) + sizeof(Pick) * top_k); }

// The count block of one source for one node, sent before the rows. The fields are indices into the block.
struct CountLayout {
  int32_t signature = 0;  // index of the call's signature
  int32_t cached = 1;     // 1 if the sender reuses a plan; -Why if it refuses its part in the call
  int32_t rows = 2;       // rows for the node: one per token with a pick there
  int32_t word = 3;       // the call's number and verb: call_word()
  int32_t experts = 0;    // first of num_experts / nodes counts
  int32_t ranks = 0;      // first of ranks_per_node counts (rows in the rank layout)
  int32_t channels = 0;   // first of `channels` row counts
  int32_t picks = 0;  // first of `logical_experts` counts: picks of the source, before replicas are chosen
  int32_t ints = 0;   // length, a multiple of 4
};

// All lanes copy a count block, 16 bytes at a time.
template <class G>
MOE_HD void copy_block(G g, int32_t* to, const int32_t* from, int64_t ints) {
  struct alignas(16) FourInts {
    int32_t v[4];
  };
  for (int64_t i = g.lane(); i < ints / 4; i += g.size())
    as<FourInts>(bytes_of(to))[i] = as<FourInts>(bytes_of(from))[i];
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

// Two free parts of a rank's arena, which it offers to its node peers at the start of a dispatch. The low one
// is used if the rows fit there (its pages are warm), else the largest one.
struct Offer {
  uint64_t offset[2] = {};
  uint64_t bytes[2] = {};

  MOE_HD constexpr int piece_for(uint64_t needed) const { return needed <= bytes[0] ? 0 : 1; }
};

// What combine returns besides the rows: nothing, a value for every pick, or sums of values.
enum class Returns : int32_t { nothing = 0, values = 1, sums = 2 };

// What a rank announces to its node peers at the start of a combine.
struct RowsBoard {
  // Window offsets; 0: none.
  Offset<char> rows;      // the experts' output
  Offset<float> weights;  // [rows]; none: every weight is 1
  Offset<float> back;     // values to return to the picks: [rows], or [rows, top_k] in the rank layout; none:
                          // zeros
  Offset<uint64_t> sums;  // checksum [rows] (read only when checks are on)
  Returns returns = Returns::nothing;  // equal on all ranks
  Why refused = Why::none;             // set if the rank refuses its part
  int32_t word = 0;                    // call_word()
  int32_t unused = 0;
};

// What a rank sends to its rail peers in a combine, once all ranks of its node have published: its node's
// verdict (ok, refused, or mismatch), and the format in which it wants rows back.
class CombineVerdict {
 public:
  int32_t word = 0;   // call_word()
  uint16_t rank = 0;  // if the verdict is not ok: the rank that caused it

  CombineVerdict() = default;
  MOE_HD constexpr CombineVerdict(int32_t word, Wire wire, Returns returns)
      : word(word),
        code_(0),
        why_(0),
        wire_(static_cast<uint8_t>(wire)),
        returns_(static_cast<uint8_t>(returns)) {}

  MOE_HD constexpr Code code() const { return static_cast<Code>(code_); }
  MOE_HD constexpr Why why() const { return static_cast<Why>(why_); }
  MOE_HD constexpr Wire wire() const { return static_cast<Wire>(wire_); }  // of the rows that it wants back
  MOE_HD constexpr Returns returns() const { return static_cast<Returns>(returns_); }
  MOE_HD constexpr bool ok() const { return code() == Code::ok; }
  MOE_HD constexpr void decide(Code code, int of_rank, Why why) {
    rank = static_cast<uint16_t>(of_rank);
    code_ = static_cast<uint8_t>(code);
    why_ = static_cast<uint8_t>(why);
  }

 private:
  uint8_t code_ : 4;
  uint8_t why_ : 4;
  uint8_t wire_ : 4;
  uint8_t returns_ : 4;
};
static_assert(sizeof(CombineVerdict) == 8);

// The verb of a call. Ranks compare words with the verb and the number of the call, to detect that they make
// different calls.
enum class Verb : int32_t {
  dispatch = 0,
  choose = 1,
  combine = 2,
  decode_dispatch = 3,
  decode_combine = 4,
  multicast = 5,
  reduce = 6,
  differs_late = 13,
  refused_late = 14,
  unknown = 15
};

// verb: one of the first three. number: announcements and combines of the Buffer so far. Words are only
// compared for equality.
MOE_HD constexpr int32_t call_word(uint64_t number, Verb verb) {
  return static_cast<int32_t>(static_cast<uint32_t>(number << 2) | static_cast<uint32_t>(verb));
}
MOE_HD constexpr Verb verb_of(int32_t word) { return static_cast<Verb>(word & 3); }
// The detail of an `out_of_step` status.
MOE_HD constexpr int32_t verbs_detail(Verb own, Verb theirs) {
  return static_cast<int32_t>(own) | static_cast<int32_t>(theirs) << 4;
}

// A node's decision about a dispatch, sent over the rail behind the rows.
struct Verdict {
  Code code;
  int32_t rank;  // if the code is not ok: the rank that caused it
  uint64_t needed;
  uint64_t available;
  int32_t detail;  // as in Status
  int32_t unused;

  MOE_HD constexpr bool ok() const { return code == Code::ok; }
};
MOE_HD constexpr Verdict make_verdict(Code code, int rank, int32_t detail = 0, uint64_t needed = 0,
                                      uint64_t available = 0) {
  return {code, rank, needed, available, detail, 0};
}
MOE_HD constexpr Status status_of(const Verdict& v) {
  return {v.code, Phase::counts, v.rank, v.detail, v.needed, v.available};
}

// Where a gateway put one pick of a row. The handle keeps it for combine and for calls that reuse the plan.
struct Place {
  int16_t local;  // destination's local rank
  uint16_t k;     // index among the token's top_k picks
  int32_t row;    // row in its block
};

// A failing rank writes this to every rank that it can reach, so that they do not wait for the whole timeout.
struct FaultWord {
  // 0: none; else code (8 bits), suspected rank + 1 (16), reporting rank + 1 (16), detail (24).
  uint64_t packed;
};
MOE_HD constexpr FaultWord pack_fault(const Status& s, int reporter) {
  return {static_cast<uint64_t>(s.code) | static_cast<uint64_t>(s.peer + 1) << 8 |
          static_cast<uint64_t>(reporter + 1) << 24 | static_cast<uint64_t>(s.detail) << 40};
}
// The same word also says, when there is no fault, in which call the rank waits: the call's verb, the memory
// that it uses, and its number among the communicator's calls.
constexpr uint64_t kWaitsCode = 0xff;
MOE_HD constexpr uint64_t waiting_word(Verb verb, uint64_t memory, uint64_t number) {
  return kWaitsCode | static_cast<uint64_t>(verb) << 8 | (memory & 0xfff) << 12 | number << 24;
}
constexpr uint64_t kMaskedWord = ~uint64_t{0};  // of a masked rank: no rank waits for it
MOE_HD constexpr bool is_waiting(uint64_t word) { return (word & 0xff) == kWaitsCode; }
MOE_HD constexpr uint64_t number_of_waiting(uint64_t word) { return word >> 24; }
MOE_HD constexpr Verb verb_of_waiting(uint64_t word) { return static_cast<Verb>(word >> 8 & 15); }
// Whether a peer waits in another call with the same number as this rank's call `own`. All ranks make their
// calls in the same order, so neither rank will ever make the other's call.
MOE_HD constexpr bool waits_elsewhere(uint64_t own, uint64_t theirs) {
  return is_waiting(theirs) && number_of_waiting(theirs) == number_of_waiting(own) && theirs != own;
}
MOE_HD constexpr Status other_call(uint64_t own, uint64_t theirs, int rank, Phase phase) {
  return {Code::out_of_step,
          phase,
          rank,
          verbs_detail(verb_of_waiting(own), verb_of_waiting(theirs)),
          own,
          theirs};
}
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
