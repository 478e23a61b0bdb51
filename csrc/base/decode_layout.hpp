// The layout of decode's memory. One function per memory gives every offset AND the total size.
//
//   node window   messages that this rank has staged and the output of its experts (node peers read both
//                 here), the packed rows of its experts, and the sums that node peers wrote for it
//   rail region   messages and answers that ranks of other nodes put here
//
// Everything exists twice, once per parity of the epoch. Areas behind `warm` are large and sparse: they are
// reserved, and a page is committed when it is first touched.
#pragma once
#include "base/layout.hpp"

namespace moecomm {

// A pick in a message. Every owner of one of a token's picks gets all of them, so that one staged message
// serves all owners.
struct DecodePick {
  int32_t expert;  // global, -1: none
  float weight;    // 1 if no weights are sent
};

// Precedes the row in a message.
struct DecodeHeader {
  int32_t token;
  int32_t unused;
  uint64_t checksum;
  // DecodePick pick[top_k] follows
  MOE_HD DecodePick* pick() { return as<DecodePick>(bytes_of(this + 1)); }
  MOE_HD const DecodePick* pick() const { return as<DecodePick>(bytes_of(this + 1)); }
  // then the row, 64-byte aligned
  MOE_HD char* row(int top_k) { return bytes_of(this) + bytes(top_k); }
  MOE_HD const char* row(int top_k) const { return bytes_of(this) + bytes(top_k); }

  MOE_HD static constexpr uint64_t bytes(int top_k) {
    return align_up(sizeof(DecodeHeader) + sizeof(DecodePick) * top_k, 64);
  }
};
MOE_HD constexpr uint64_t decode_header_bytes(int top_k) { return DecodeHeader::bytes(top_k); }
MOE_HD constexpr uint64_t decode_message_bytes(const Shape& s) {
  return decode_header_bytes(s.top_k) + align_up(s.slot_bytes(), 64);
}

// A flag says that the messages (or answers) of an epoch are complete, the mode of the call, and how many
// there are. Its value only grows, so it is never reset.
constexpr int kFlagCountBits = 21, kFlagModeBits = 3;
constexpr int kRefusedMode = 7;  // the rank refuses its part; the count field has the reason, a Why
constexpr int64_t kDecodeMaxTokens = int64_t{1} << (kFlagCountBits - 1);

MOE_HD constexpr uint64_t make_flag(uint64_t epoch, int mode, int64_t count) {
  return (epoch << kFlagModeBits | static_cast<uint64_t>(mode)) << kFlagCountBits |
         static_cast<uint64_t>(count);
}
MOE_HD constexpr int32_t flag_count(uint64_t flag) {
  return static_cast<int32_t>(flag & ((uint64_t{1} << kFlagCountBits) - 1));
}
MOE_HD constexpr int flag_mode(uint64_t flag) {
  return static_cast<int>(flag >> kFlagCountBits & ((1 << kFlagModeBits) - 1));
}

// The flag of an owner's answers. An epoch may be combined several times, `combine` = 0, 1, 2, ...; so the
// number of the combine is above the mode, and the flag still only grows.
constexpr int kWhyBits = 7, kCombineBits = kFlagCountBits - kWhyBits;
constexpr int32_t kMostCombines = 1 << kCombineBits;  // of an epoch

MOE_HD constexpr uint64_t make_answer_flag(uint64_t epoch, int32_t combine, int mode, Why refused) {
  return make_flag(epoch, 0, 0) | static_cast<uint64_t>(combine) << (kFlagModeBits + kWhyBits) |
         static_cast<uint64_t>(mode) << kWhyBits | static_cast<uint64_t>(refused);
}
MOE_HD constexpr int answer_mode(uint64_t flag) {
  return static_cast<int>(flag >> kWhyBits & ((1 << kFlagModeBits) - 1));
}
MOE_HD constexpr int32_t answer_refusal(uint64_t flag) {
  return static_cast<int32_t>(flag & ((1 << kWhyBits) - 1));
}

struct DecodeWindowLayout {
  CounterAt sent;            // flag per parity and local rank: it has staged messages for this rank
  CounterAt answered;        // flag per parity and local rank: its experts' rows may be read, or its sums
                             // have been written here
  CounterAt released;        // flag per parity and local rank: it has received all combines before that one
  Offset<FaultWord> faults;  // per local rank
  Offset<int32_t> wanted;    // per parity, local rank and slot: the token of the message in this slot
  Offset<int32_t> places;    // per parity, local rank, token and k: the index of that pick's row in `rows`
  Offset<int64_t> counts;    // per parity and local expert
  Offset<DecodeHeader> messages;  // per parity and token, decode_message_bytes() apart
  uint64_t warm;                  // end of the memory that is committed at start
  Offset<char> sums;              // row per parity, token and k
  Offset<char> x;                 // row per parity, local expert, size * max_tokens
  Offset<char> scales;     // per parity and local expert: scale_bytes for each row of x, columns padded to
                           // 16 bytes
  Offset<char> rows;       // as x
  Offset<char> coded;      // per parity, rank of another node, slot and pick: an outgoing answer in FP8 or
                           // LogFMT
  Offset<uint64_t> signs;  // per parity, source rank, token and k: checksum of the answer to that pick
                           // (written only when checks are on)
  uint64_t bytes;
};

MOE_HD constexpr uint64_t decode_rows_per_expert(const Geometry& g, const Shape& s) {
  return uint64_t(g.size) * s.max_tokens;
}
MOE_HD constexpr uint64_t decode_scale_area(const Geometry& g, const Shape& s) {
  return scale_column(decode_rows_per_expert(g, s)) * s.scale_bytes();
}
MOE_HD constexpr int decode_picks_per_rank(const Geometry& g, const Shape& s) {
  return s.num_experts / g.size < s.top_k ? s.num_experts / g.size : s.top_k;
}

MOE_HD constexpr DecodeWindowLayout decode_window_layout(const Geometry& g, const Shape& s) {
  DecodeWindowLayout l{};
  detail::Cursor c;
  const uint64_t p = g.ranks_per_node, t = s.max_tokens, k = s.top_k, experts = s.num_experts / g.size;
  const uint64_t packed = 2 * experts * decode_rows_per_expert(g, s);
  c.take(sizeof(MemoryHeader));
  l.sent = c.take<uint64_t>(2 * p);
  l.answered = c.take<uint64_t>(2 * p);
  l.released = c.take<uint64_t>(2 * p);
  l.faults = c.take<FaultWord>(p);
  l.wanted = c.take<int32_t>(2 * p * t);
  l.places = c.take<int32_t>(2 * p * t * k);
  l.counts = c.take<int64_t>(2 * experts);
  l.messages = {c.take(2 * t * decode_message_bytes(s))};
  l.warm = c.at;
  l.sums = c.take<char>(2 * t * k * s.combine_row_bytes(), 4096);
  l.x = c.take<char>(packed * s.combine_row_bytes(), 4096);
  l.scales = c.take<char>(2 * experts * decode_scale_area(g, s), 4096);
  l.rows = c.take<char>(packed * s.combine_row_bytes(), 4096);
  l.coded = c.take<char>(2 * (g.size - p) * t * decode_picks_per_rank(g, s) * s.slot_bytes(), 4096);
  l.signs = c.take<uint64_t>(2 * g.size * t * k, 4096);
  l.bytes = align_up(c.at, 4096);
  return l;
}

struct DecodeRegionLayout {
  CounterAt sent;                 // flag per parity and rank: its messages have arrived
  CounterAt answered;             // flag per parity and rank: its answers have arrived
  CounterAt released;             // as in the window
  Offset<FaultWord> faults;       // per rank
  Offset<FaultWord> fault_out;    // source of outgoing puts
  Offset<DecodeHeader> messages;  // per parity, rank of another node and slot
  Offset<char> answers;           // per parity, token and k
  Offset<uint64_t> signs;  // per parity, rank, token and k: checksum of its answer to that pick (written only
                           // when checks are on)
  uint64_t bytes;
};

MOE_HD constexpr DecodeRegionLayout decode_region_layout(const Geometry& g, const Shape& s) {
  DecodeRegionLayout l{};
  detail::Cursor c;
  const uint64_t remote = g.size - g.ranks_per_node, t = s.max_tokens;
  c.take(sizeof(MemoryHeader));
  l.sent = c.take<uint64_t>(2 * g.size);
  l.answered = c.take<uint64_t>(2 * g.size);
  l.released = c.take<uint64_t>(2 * g.size);
  l.faults = c.take<FaultWord>(g.size);
  l.fault_out = c.take<FaultWord>(1);
  l.messages = {c.take(2 * remote * t * decode_message_bytes(s))};
  l.answers = c.take<char>(remote ? 2 * t * s.top_k * s.slot_bytes() : 0);
  l.signs = c.take<uint64_t>(remote ? 2 * g.size * t * s.top_k : 0);
  l.bytes = align_up(c.at, 4096);
  return l;
}

}  // namespace moecomm
