// Decode: dispatch and combine in microseconds. Everything has a fixed place that follows from (parity of the
// epoch, source, slot), so no counts are exchanged, nothing is allocated and there is no barrier.
//
//   dispatch, send      decode_list, [decode_shift_slots], decode_send, decode_announce (decode_send.hpp)
//   dispatch, receive   decode_accept, decode_number, [decode_shift_places], decode_pack (decode_receive.hpp)
//   combine, send       decode_answer, decode_reply (decode_answer.hpp) combine, receive decode_wait_answers,
//   decode_sum                                      (decode_sum.hpp)
//
// One group runs them one after another. Many groups share the tokens of a rank, and the messages that came,
// as slices: each numbers its own slice from 0 and, when all have met, shifts it by what is before it.
//
// One message per token and destination rank, straight to its owner. To a rank of another node it is put
// into that rank's region. Inside a node it stays where it was staged and the owner fetches it: the copy into
// the packed place, which is due anyway, is then the transfer. Likewise the experts' rows: put over the rail,
// read in place inside the node.
//
// Why no rank overwrites what a slower one still reads. Epochs are numbered 1, 2, 3, ... and alternate
// between two sets of places. Every rank follows two rules of its own, both enforced by the runtime:
//   (A) it has received dispatch e-1 before it sends dispatch e;
//   (B) it has received combine e-2 before it sends dispatch e, if it sent that combine at all.
// Every dispatch raises a flag at every rank, also with no message behind it. Hence, when a rank sends
// dispatch e, it has the flags of e-1 from all ranks (A), so by (A) all of them have received dispatch e-2:
//   - messages of e-2 (staged here, or put into their regions) have been read, and this rank's flags with
//   them;
// and when it has received dispatch e, all ranks have sent e, so by (B) they have received combine e-2:
//   - places, experts' rows, answers and sums of e-2 have been read.
// Only then are the places written again: by decode_accept and by the experts, both behind the receipt of e,
// and by decode_answer behind that. A weighted answer leaves from the slot of its message: its source has
// seen the answer's flag (B), which lies behind the answer, before it fills that slot again. The argument
// needs neither a combine per dispatch nor an even number of calls, and bounds how far a rank can run ahead:
// one dispatch.
//
// What the caller sees as tensors (x, scales, counts, rows) lies in one of two banks. Where the host numbers
// the epochs, bank = parity. Where it does not (a captured graph is replayed: its tensors stay, the epochs go
// on), a bank may serve two epochs in a row. x, scales and counts are the rank's own. The experts' rows are
// read by node peers until they have received the combine; so a rank that gives the next epoch the same bank
// must follow
//   (C) it has received combine e-1 before it sends dispatch e, if it sent that combine at all,
// by which the receipt of e says that the rows of e-1 have been read.
#pragma once
#include "base/decode_layout.hpp"
#include "fabric/fabric.hpp"

namespace moecomm {

struct DecodeView {
  Geometry geometry;
  Shape shape;
  DecodeWindowLayout window;
  DecodeRegionLayout region;
  bool check = false;  // MOECOMM_CHECK=1
  int per_rank = 1;    // experts of a rank; a field since every pick of every message asks for it
  int note_per_source = 0,
      note_per_slot = 1;  // how notes lie: those of a source side by side, unless a world wants it otherwise

  MOE_HD int experts_per_rank() const { return per_rank; }
  MOE_HD int first_expert() const { return geometry.rank * experts_per_rank(); }
  MOE_HD int owner(int expert) const { return expert / experts_per_rank(); }
  MOE_HD bool near(int rank) const { return rank / geometry.ranks_per_node == geometry.node(); }
  MOE_HD int local(int rank) const { return rank % geometry.ranks_per_node; }

  // Window offsets; `at` counts tokens of the rank that is meant.
  MOE_HD CounterAt sent_flag(int parity, int local) const {
    return window.sent + (parity * geometry.ranks_per_node + local);
  }
  MOE_HD CounterAt answered_flag(int parity, int local) const {
    return window.answered + (parity * geometry.ranks_per_node + local);
  }
  MOE_HD Offset<int32_t> wanted(int parity, int local) const {
    return window.wanted + uint64_t(parity * geometry.ranks_per_node + local) * shape.max_tokens;
  }
  MOE_HD Offset<int32_t> places(int parity, int local) const {
    return window.places +
           uint64_t(parity * geometry.ranks_per_node + local) * shape.max_tokens * shape.top_k;
  }
  MOE_HD Offset<int64_t> counts(int bank) const {
    return window.counts + uint64_t(bank) * experts_per_rank();
  }
  MOE_HD Offset<DecodeHeader> message(int parity, int token) const {
    return window.messages.moved((uint64_t(parity) * shape.max_tokens + token) * decode_message_bytes(shape));
  }
  MOE_HD Offset<char> sum(int parity, int token, int k) const {
    return window.sums + answer_index(parity, token, k) * shape.combine_row_bytes();
  }
  MOE_HD uint64_t packed_rows() const { return experts_per_rank() * decode_rows_per_expert(geometry, shape); }
  MOE_HD Offset<char> x(int bank) const {
    return window.x + bank * packed_rows() * shape.combine_row_bytes();
  }
  MOE_HD Offset<char> scales(int bank, int expert) const {
    return window.scales + uint64_t(bank * experts_per_rank() + expert) * decode_scale_area(geometry, shape);
  }
  MOE_HD Offset<char> rows(int bank) const {
    return window.rows + bank * packed_rows() * shape.combine_row_bytes();
  }
  MOE_HD Offset<char> coded(int parity, int to, int slot, int pick) const {
    const uint64_t row =
        (uint64_t(parity) * remote() + remote_rank(to, geometry.rank)) * shape.max_tokens + slot;
    return window.coded + (row * decode_picks_per_rank(geometry, shape) + pick) * shape.slot_bytes();
  }
  MOE_HD Offset<uint64_t> signs(int parity, int source) const {
    return window.signs + uint64_t(parity * geometry.size + source) * shape.max_tokens * shape.top_k;
  }

  // Region offsets.
  MOE_HD CounterAt remote_sent_flag(int parity, int rank) const {
    return region.sent + (parity * geometry.size + rank);
  }
  MOE_HD CounterAt remote_answered_flag(int parity, int rank) const {
    return region.answered + (parity * geometry.size + rank);
  }
  // From rank `from` in the region of rank `at`.
  MOE_HD Offset<DecodeHeader> landed(int parity, int from, int at, int slot) const {
    return region.messages.moved(
        ((uint64_t(parity) * remote() + remote_rank(from, at)) * shape.max_tokens + slot) *
        decode_message_bytes(shape));
  }
  MOE_HD Offset<char> answer(int parity, int token, int k) const {
    return region.answers + answer_index(parity, token, k) * shape.slot_bytes();
  }
  MOE_HD Offset<uint64_t> landed_signs(int parity, int owner) const {
    return region.signs + uint64_t(parity * geometry.size + owner) * shape.max_tokens * shape.top_k;
  }

 private:
  MOE_HD int remote() const { return geometry.size - geometry.ranks_per_node; }
  // Index of a rank among those of other nodes, as rank `at` counts them.
  MOE_HD int remote_rank(int rank, int at) const {
    const int p = geometry.ranks_per_node;
    return rank < at / p * p ? rank : rank - p;
  }
  MOE_HD uint64_t answer_index(int parity, int token, int k) const {
    return (uint64_t(parity) * shape.max_tokens + token) * shape.top_k + k;
  }
};

inline DecodeView make_decode_view(const Geometry& g, const Shape& s, bool check) {
  return DecodeView{g,
                    s,
                    decode_window_layout(g, s),
                    decode_region_layout(g, s),
                    check,
                    s.num_experts / g.size,
                    s.max_tokens,
                    1};
}

// What a rank remembers of one parity's epoch. Private.
struct DecodeTurn {
  uint64_t epoch = 0;
  int32_t bank = 0;
  int32_t tokens = 0;
  int32_t mode = 0;
  CallShape call;              // row_bytes and scales of the rows that travel
  bool weighted = false;       // weights travel: a rank answers with one row per token
  int32_t* ids = nullptr;      // [T, K] the picks as sent
  int32_t* slot = nullptr;     // [T, K] slot at the pick's owner; -1 where an earlier pick has the same owner
  int32_t* sent = nullptr;     // [R] messages for that rank
  int32_t* got = nullptr;      // [R] messages from that rank
  int32_t* arrived = nullptr;  // [R, max_tokens, 1 + 2 K] of every message that came: its token; which own
                               // expert each pick is, -1: none; and, from other nodes, where its row lies
  float* weights = nullptr;    // [T, K] of combine
  uint64_t* sent_flag = nullptr;      // [R] what this rank last wrote into its flags there
  uint64_t* answered_flag = nullptr;  // [R]

  MOE_HD int parity() const { return static_cast<int>(epoch & 1); }
  MOE_HD bool refused() const {
    return mode == kRefusedMode;
  }  // by this rank: what comes is awaited, and not looked at
};

// Bytes of a turn's tables; where there is memory for them, they are placed in it.
MOE_HD inline uint64_t place_decode_turn(const DecodeView& d, char* memory, DecodeTurn& t) {
  const uint64_t picks = uint64_t(d.shape.max_tokens) * d.shape.top_k, size = d.geometry.size;
  detail::Cursor c;
  const auto take = [&]<class T>(T*& table, uint64_t count) {
    const Offset<T> at = c.take<T>(count);
    if (memory) table = at.in(memory);
  };
  take(t.ids, picks);
  take(t.slot, picks);
  take(t.weights, picks);
  take(t.sent, size);
  take(t.got, size);
  take(t.arrived, size * (d.shape.max_tokens + 2 * picks));
  take(t.sent_flag, size);
  take(t.answered_flag, size);
  return c.at;
}

struct DecodeSendArgs {
  DecodeView d;
  DecodeTurn turn;
  const int64_t* ids64 = nullptr;  // [T, K], one of the two
  const int32_t* ids32 = nullptr;
  const char* x = nullptr;         // [T, row_bytes]; [T, H] of the buffer's dtype where this side quantizes
  const char* scales = nullptr;    // [T, scale_bytes] or null
  const float* weights = nullptr;  // [T, K] or null: then none travel
  Why refused = Why::none;         // this rank sends nothing and tells the others so

  MOE_HD bool quantizes() const { return turn.call.scales != ScaleKind::none && scales == nullptr; }
};

struct DecodeReceiveArgs {
  DecodeView d;
  DecodeTurn turn;
};

struct DecodeCombineArgs {
  DecodeView d;
  DecodeTurn turn;
  int32_t mode = 0;            // of the answers
  Wire wire = Wire::plain;     // of those that cross between nodes
  const char* rows = nullptr;  // packed, [E/R, R * max_tokens, H]
  char* y = nullptr;           // [T, H]
  Why refused = Why::none;     // this rank has no answers and tells the others so
};

namespace detail {

// What a flag of `rank` says that is not what this rank's own says.
MOE_HD inline Status other_mode(uint64_t flag, int mode, Phase phase, int rank) {
  if (flag_mode(flag) == kRefusedMode) return {Code::refused, phase, rank, flag_count(flag)};
  return {
      Code::mismatch, phase, rank, 0, static_cast<uint64_t>(mode), static_cast<uint64_t>(flag_mode(flag))};
}

// Found on the way, while the other ranks are still awaited: the first refusal, else the last mismatch.
MOE_HD inline void keep_finding(Status& found, const Status& s) {
  if (keeps_step(s) && found.code != Code::refused) found = s;
}

MOE_HD inline int32_t* arrived(const DecodeView& d, const DecodeTurn& turn, int source, int slot) {
  return turn.arrived +
         (int64_t{source} * d.note_per_source + int64_t{slot} * d.note_per_slot) * (1 + 2 * d.shape.top_k);
}

// The message of `source` in `slot`, which is about `token`: in its window, or landed in this rank's region.
template <LaneFabric F>
MOE_HD DecodeHeader* decode_message(F f, const DecodeView& d, const DecodeTurn& turn, int source, int slot,
                                    int token) {
  if (!d.near(source)) return f.rail(d.landed(turn.parity(), source, d.geometry.rank, slot));
  return f.window(d.local(source), d.message(turn.parity(), token));
}

// Where the rows of a token's picks lie here: indices of rows in both banks. Node peers read them; of others
// they are private.
template <LaneFabric F>
MOE_HD int32_t* decode_places(F f, const DecodeView& d, const DecodeTurn& turn, int source, int32_t* note) {
  if (!d.near(source)) return note + 1 + d.shape.top_k;
  return f.window(d.geometry.local(), d.places(turn.parity(), d.local(source))) +
         int64_t{note[0]} * d.shape.top_k;
}

// What many groups have counted before group `part`, of one field.
MOE_HD inline int32_t sum_before(const int32_t* counts, int64_t stride, int part) {
  int32_t before = 0;
  MOE_UNROLL(16)
  for (int i = 0; i < part; ++i) before += counts[i * stride];
  return before;
}

}  // namespace detail

}  // namespace moecomm
