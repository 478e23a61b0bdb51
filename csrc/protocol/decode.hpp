// Decode: dispatch and combine with the least latency. Everything has a fixed place, computed from (parity of
// the epoch, source, slot), so no counts are exchanged, nothing is allocated, and there is no barrier.
//
//   dispatch, send      decode_list, [decode_shift_slots], decode_send, decode_announce (decode_send.hpp)
//   dispatch, receive   decode_accept, decode_number, [decode_shift_places], decode_pack (decode_receive.hpp)
//   combine, send       [decode_release, decode_await_release (decode_release.hpp)],
//                       decode_answer, decode_reply (decode_answer.hpp)
//   combine, receive    decode_wait_answers, decode_sum (decode_sum.hpp)
//
// One group runs them one after another. Many groups divide the tokens of a rank, and the messages that have
// arrived, into slices: each group numbers its slice from 0. After a barrier it shifts the numbers by the
// total of the slices before it.
//
// There is one message per token and owner, sent directly to the owner. It is put into the region of an owner
// on another node. Inside a node the message stays where its source staged it, and the owner reads it there:
// the copy to its place among the packed rows, which is necessary anyway, is then the transfer. The experts'
// rows return in the same way: put over the rail, or read in place inside the node.
//
// Why no rank overwrites what a slower one still reads. Epochs are numbered 1, 2, 3, ... and alternate
// between two sets of places. Every rank follows two rules, both enforced by the runtime:
//   (A) it has received dispatch e-1 before it sends dispatch e;
//   (B) it has received combine e-2 before it sends dispatch e, if it sent that combine at all.
// Every dispatch raises a flag at every rank, even if no message comes with it. Hence, when a rank sends
// dispatch e, it has the flags of e-1 from all ranks (A), so by (A) all of them have received dispatch e-2:
//   - messages of e-2 (staged here, or put into their regions) and this rank's flags have been read;
// and when it has received dispatch e, all ranks have sent e, so by (B) they have received combine e-2:
//   - places, experts' rows, answers and sums of e-2 have been read.
// Only then are the places written again: by decode_accept and by the experts, both after the receipt of e,
// and later by decode_answer. A weighted answer is sent from the slot of its message: its source has seen the
// answer's flag (B), which is ordered after the answer, before it fills that slot again. The argument
// requires neither a combine per dispatch nor an even number of calls. A rank can be at most one dispatch
// ahead of the others.
//
// What the caller sees as tensors (x, scales, counts, rows) is in one of two banks. If the host numbers the
// epochs, bank = parity. If it does not (a captured graph is replayed: its tensors stay the same, but each
// replay is a new epoch), two epochs in a row may use the same bank. x, scales and counts are private to the
// rank. The experts' rows are read by node peers until they have received the combine; so a rank that uses
// the same bank for the next epoch must also follow
//   (C) it has received combine e-1 before it sends dispatch e, if it sent that combine at all,
// so that the receipt of e implies that the rows of e-1 have been read.
//
// An epoch may be combined several times. The answers of each combine are in the same places, so before a
// rank sends anything of a further combine, it follows
//   (D) every source of its messages has received the combine before.
// Sources say so when they begin the further combine (decode_release), because only then is it known that
// there is one. So nothing is added to an epoch that is combined once. With several combines, "it has
// received combine e" in (B) and (C) means the last one.
//
// Dead ranks may be masked between two steps. The view points to a table of them, in memory that a captured
// call reads in every replay. Picks of a masked rank's experts are treated as -1, so no message is sent to it
// and no answer of it is awaited. It gets no flag, and its number of messages is 0. Before the table is
// written no call runs on any rank. Every remaining rank then continues from the same epoch, which is higher
// than any that was used. So an earlier flag is never taken for that of a later step, and (A), (B) and (C)
// hold again among the remaining ranks. A masked rank must be dead: a late put of a live rank could overwrite
// data of another rank.
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
  int per_rank = 1;    // experts of a rank; a field, because it is used for every pick of every message
  // The strides of notes (DecodeTurn::arrived). By default the notes of one source are contiguous.
  int note_per_source = 0, note_per_slot = 1;
  const uint8_t* mask = nullptr;  // [R] not 0: the rank is dead and masked; null: no rank is

  // Read in every call, so that a captured call skips a rank that was masked after the capture.
  MOE_HD bool masked(int rank) const { return mask != nullptr && mask[rank] != 0; }
  // The pick, or -1 if the owner of its expert is masked.
  MOE_HD int64_t served(int64_t id) const {
    return mask != nullptr && id >= 0 && id < shape.num_experts && masked(owner(static_cast<int>(id))) ? -1
                                                                                                       : id;
  }

  MOE_HD int experts_per_rank() const { return per_rank; }
  MOE_HD int first_expert() const { return geometry.rank * experts_per_rank(); }
  MOE_HD int owner(int expert) const { return expert / experts_per_rank(); }
  MOE_HD bool same_node(int rank) const { return rank / geometry.ranks_per_node == geometry.node(); }
  MOE_HD int local(int rank) const { return rank % geometry.ranks_per_node; }

  // Window offsets.
  MOE_HD CounterAt sent_flag(int parity, int local) const {
    return window.sent + (parity * geometry.ranks_per_node + local);
  }
  MOE_HD CounterAt answered_flag(int parity, int local) const {
    return window.answered + (parity * geometry.ranks_per_node + local);
  }
  MOE_HD CounterAt released_flag(int parity, int local) const {
    return window.released + (parity * geometry.ranks_per_node + local);
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
  MOE_HD CounterAt remote_released_flag(int parity, int rank) const {
    return region.released + (parity * geometry.size + rank);
  }
  // The message of rank `from` in the region of rank `at`.
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
  // Index of `rank` among the ranks on other nodes than rank `at`.
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

// What a rank remembers of an epoch; there is one turn per parity. Private to the rank.
struct DecodeTurn {
  uint64_t epoch = 0;
  int32_t bank = 0;
  int32_t tokens = 0;
  int32_t mode = 0;
  int32_t combine = 0;      // number of the combine, among those of the epoch
  CallShape call;           // row_bytes and scales of the rows that are sent
  bool weighted = false;    // weights are sent: a rank answers with one row per token
  int32_t* ids = nullptr;   // [T, K] the picks as sent
  int32_t* slot = nullptr;  // [T, K] slot at the pick's owner; -1 where an earlier pick has the same owner
  int32_t* sent = nullptr;  // [R] messages for that rank
  int32_t* got = nullptr;   // [R] messages from that rank
  // [R, max_tokens, 1 + 2 K] a note per message that arrived: its token; the local expert of each pick, or
  // -1; for sources on other nodes, the place of its row.
  int32_t* arrived = nullptr;
  float* weights = nullptr;           // [T, K] of combine
  uint64_t* sent_flag = nullptr;      // [R] the value that this rank last gave its flag at that rank
  uint64_t* answered_flag = nullptr;  // [R]
  uint64_t* released_flag = nullptr;  // [R]

  MOE_HD int parity() const { return static_cast<int>(epoch & 1); }
  // Whether this rank refused the dispatch. It then waits for the messages of others, but does not read them.
  MOE_HD bool refused() const { return mode == kRefusedMode; }
};

// Returns the bytes of a turn's tables. If memory is not null, places the tables in it.
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
  take(t.released_flag, size);
  return c.at;
}

// The arguments of the roles. Like DispatchArgs they have no defaults.
struct DecodeSendArgs {
  DecodeView d;
  DecodeTurn turn;
  const int64_t* ids64;  // [T, K], one of the two
  const int32_t* ids32;
  const char* x;         // [T, row_bytes]; [T, H] of the buffer's dtype if quantizes()
  const char* scales;    // [T, scale_bytes] or null
  const float* weights;  // [T, K] or null: none are sent
  Why refused;           // set: this rank sends nothing and announces that it refuses

  MOE_HD constexpr DecodeSendArgs(const DecodeView& d, const DecodeTurn& turn, const int64_t* ids64,
                                  const int32_t* ids32, const char* x, const char* scales,
                                  const float* weights, Why refused)
      : d(d),
        turn(turn),
        ids64(ids64),
        ids32(ids32),
        x(x),
        scales(scales),
        weights(weights),
        refused(refused) {}

  MOE_HD bool quantizes() const { return turn.call.scales != ScaleKind::none && scales == nullptr; }
};

struct DecodeReceiveArgs {
  DecodeView d;
  DecodeTurn turn;

  MOE_HD constexpr DecodeReceiveArgs(const DecodeView& d, const DecodeTurn& turn) : d(d), turn(turn) {}
};

struct DecodeCombineArgs {
  DecodeView d;
  DecodeTurn turn;
  int32_t mode;      // of the answers
  Wire wire;         // of the answers that cross nodes
  const char* rows;  // packed, [E/R, R * max_tokens, H]
  char* y;           // [T, H]
  Why refused;       // set: this rank sends no answers and announces that it refuses

  MOE_HD constexpr DecodeCombineArgs(const DecodeView& d, const DecodeTurn& turn, int32_t mode, Wire wire,
                                     const char* rows, char* y, Why refused)
      : d(d), turn(turn), mode(mode), wire(wire), rows(rows), y(y), refused(refused) {}
};

namespace detail {

// The failure when the flag of `rank` has another mode than this rank's call. why: of a refusal.
MOE_HD inline Status other_mode(int theirs, int32_t why, int mode, Phase phase, int rank) {
  if (theirs == kRefusedMode) return {Code::refused, phase, rank, why};
  return {Code::mismatch, phase, rank, 0, static_cast<uint64_t>(mode), static_cast<uint64_t>(theirs)};
}

// Keeps a failure that is found while other ranks are still awaited: the first refusal, else the last
// mismatch.
MOE_HD inline void keep_finding(Status& found, const Status& s) {
  if (keeps_step(s) && found.code != Code::refused) found = s;
}

// The note about the message of `source` in `slot`.
MOE_HD inline int32_t* arrived(const DecodeView& d, const DecodeTurn& turn, int source, int slot) {
  return turn.arrived +
         (int64_t{source} * d.note_per_source + int64_t{slot} * d.note_per_slot) * (1 + 2 * d.shape.top_k);
}

// The message of `source` in `slot`, for its token `token`: in the source's window or in this rank's region.
template <LaneFabric F>
MOE_HD DecodeHeader* decode_message(F f, const DecodeView& d, const DecodeTurn& turn, int source, int slot,
                                    int token) {
  if (!d.same_node(source)) return f.rail(d.landed(turn.parity(), source, d.geometry.rank, slot));
  return f.window(d.local(source), d.message(turn.parity(), token));
}

// The places of the rows of a token's picks on this rank, as row indices over both banks. Node peers read the
// places of their tokens; those for ranks of other nodes are private.
template <LaneFabric F>
MOE_HD int32_t* decode_places(F f, const DecodeView& d, const DecodeTurn& turn, int source, int32_t* note) {
  if (!d.same_node(source)) return note + 1 + d.shape.top_k;
  return f.window(d.geometry.local(), d.places(turn.parity(), d.local(source))) +
         int64_t{note[0]} * d.shape.top_k;
}

// The sum of one field of `counts` over the groups before group `part`.
MOE_HD inline int32_t sum_before(const int32_t* counts, int64_t stride, int part) {
  int32_t before = 0;
  MOE_UNROLL(16)
  for (int i = 0; i < part; ++i) before += counts[i * stride];
  return before;
}

}  // namespace detail

}  // namespace moecomm
