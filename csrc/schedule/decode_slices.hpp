// The schedule of one rank's decode on many concurrent groups. Independent of the world, like the protocol. A
// `|` is a barrier of all groups (meet).
//
//   dispatch, send      list a slice of the tokens | shift its slots, send it | announce to some ranks
//   dispatch, receive   accept and number a part of a source's messages | shift their places, pack them
//   a further combine   first: release some owners, await some sources |
//   combine, send       check the ids, answer a part of a source's messages | reply to some sources
//   combine, receive    wait for what a slice of the tokens needs, sum it
//
// The epoch of a call is read from the rank's own memory and not passed by the host: a captured graph may be
// replayed any number of times, and every replay is a new epoch. The host identifies a dispatch by a ticket;
// the clock has the epochs of the last two tickets. All groups read the clock when a call begins. The first
// group writes it after the barrier.
#pragma once
#include "protocol/decode_answer.hpp"
#include "protocol/decode_receive.hpp"
#include "protocol/decode_release.hpp"
#include "protocol/decode_send.hpp"
#include "protocol/decode_stage.hpp"
#include "protocol/decode_sum.hpp"
#include "protocol/plan.hpp"

namespace moecomm {

// In the rank's own memory, zero at first.
struct DecodeClock {
  struct Turn {
    uint64_t ticket;
    DecodeStage stage;  // only the first group uses it
    int32_t bank;
  };
  uint64_t epoch;           // of the latest dispatch
  Turn turn[2];             // by parity
  uint64_t refused = 0;     // the latest epoch whose dispatch any rank has refused, as far as this rank knows
  uint64_t unanswered = 0;  // the latest epoch whose combine this rank has refused
};

// A barrier of all groups of the rank: earlier writes of each group are visible to all. Returns the Status of
// a failed or late group.
template <class Barrier, class G>
concept GroupBarrier = requires(Barrier barrier, G g) {
  { barrier.wait(g) } -> std::same_as<Status>;
};

// The state that a rank keeps between calls, in its own memory.
struct DecodeMemory {
  DecodeClock* clock;
  char* tables;           // for both parities: see place_decode_turn
  uint64_t table_bytes;   // for one parity
  int32_t* slice_counts;  // scratch: decode_scratch_ints
};

// Equal for all groups of a call. args.turn has only what the host knows: neither the epoch nor the tables.
struct DecodeDispatchWork {
  DecodeSendArgs args;
  DecodeMemory memory;
  uint64_t ticket;
  bool sends, receives;
};

struct DecodeCombineWork {
  DecodeCombineArgs args;
  DecodeMemory memory;
  uint64_t ticket;
  const int64_t*
      ids64;  // [T, K]; must be the ids of the dispatch; in ids64 or in ids32, the other one is null
  const int32_t* ids32;
  const float* weights;  // null: 1
  const char* staged;    // the experts' rows if they are not in the window; they are then copied to args.rows
  bool answers, sums;
};

MOE_HD constexpr uint64_t decode_scratch_ints(const Geometry& g, const Shape& s, int groups) {
  const uint64_t per_rank = s.num_experts / g.size, size = g.size;
  return (groups > g.size ? groups : g.size) * (per_rank > size ? per_rank : size);
}

namespace detail {

// The least number of messages of a source in a slice. Smaller slices would mean more counts to add up.
constexpr int kMessagesPerSlice = 8;

// Checks rules A, B and C of decode.hpp for the dispatch of `epoch` into `bank`.
MOE_HD inline Status check_turns(const DecodeClock& clock, uint64_t epoch, int bank) {
  const DecodeClock::Turn &last = clock.turn[(epoch - 1) & 1], &before = clock.turn[epoch & 1];
  if (!keeps_rule_a(last.stage)) return wrong_stage(DecodeStage::received, last.stage);
  if (!keeps_rule_b(before.stage)) return wrong_stage(DecodeStage::done, before.stage);
  if (!keeps_rule_c(last.stage, last.bank == bank)) return wrong_stage(DecodeStage::done, last.stage);
  return {};
}

// Only the first group reads and writes stages.
template <Group G>
MOE_HD Status expect_stage(G g, int index, DecodeClock* clock, uint64_t epoch, DecodeStage needed) {
  if (index != 0) return {};
  return leader(g, [&] {
    const DecodeStage is = clock->turn[epoch & 1].stage;
    return is == needed ? Status{} : wrong_stage(needed, is);
  });
}
template <Group G>
MOE_HD void set_stage(G g, int index, DecodeClock* clock, uint64_t epoch, DecodeStage stage) {
  if (index == 0 && g.lane() == 0) clock->turn[epoch & 1].stage = stage;
}

MOE_HD inline int parts_of_source(const DecodeView& d, int groups) {
  const int most = (d.shape.max_tokens + kMessagesPerSlice - 1) / kMessagesPerSlice,
            parts = groups / d.geometry.size;
  return parts < 1 ? 1 : parts < most ? parts : most;
}

MOE_HD inline int parts_of_tokens(const DecodeTurn& turn, int groups) {
  return turn.tokens < 1 ? 1 : turn.tokens < groups ? turn.tokens : groups;
}

template <Group G, Fabric<G> F, GroupBarrier<G> Barrier>
MOE_HD Status send_group(G g, F f, Barrier barrier, const DecodeDispatchWork& w, const DecodeSendArgs& a,
                         int index, int groups, bool& refused) {
  const int size = a.d.geometry.size, parts = parts_of_tokens(a.turn, groups);
  const int begin = channel_begin(a.turn.tokens, index, parts),
            end = channel_begin(a.turn.tokens, index + 1, parts);
  if (index == 0) MOE_TRY(leader(g, [&] { return check_turns(*w.memory.clock, a.turn.epoch, a.turn.bank); }));
  if (index < parts && !decode_list(g, a, begin, end, w.memory.slice_counts + int64_t{index} * size).ok() &&
      g.lane() == 0)
    w.memory.clock->refused = a.turn.epoch;
  MOE_TRY(barrier.wait(g));  // nothing moves before all picks have been checked
  refused = a.refused != Why::none || w.memory.clock->refused == a.turn.epoch;
  if (index < parts && !refused) {
    decode_shift_slots(g, a, begin, end, w.memory.slice_counts, index, parts);
    decode_send(g, f, a, begin, end);
  }
  MOE_TRY(barrier.wait(g));
  decode_announce(g, f, a,
                  !refused                 ? Why::none
                  : a.refused != Why::none ? a.refused
                                           : Why::picks,
                  index, groups);
  if (index == 0 && g.lane() == 0) {
    w.memory.clock->epoch = a.turn.epoch;
    w.memory.clock->turn[a.turn.parity()] = {w.ticket, DecodeStage::sent, a.turn.bank};
  }
  if (g.lane() == 0 && index == 0) ++f.counters().calls;
  return {};
}

// Detects sources that make the call with other arguments or refuse their part. The messages of the other
// sources are still received (rule A).
template <Group G, Fabric<G> F, GroupBarrier<G> Barrier>
MOE_HD Status receive_group(G g, F f, Barrier barrier, const DecodeDispatchWork& w,
                            const DecodeReceiveArgs& a, int index, int groups) {
  const DecodeView& d = a.d;
  const int per_rank = d.experts_per_rank(), parts = parts_of_source(d, groups),
            slices = d.geometry.size * parts;
  Status found;
  for (int i = index; i < slices; i += groups) {
    int32_t* counts = w.memory.slice_counts + int64_t{i} * per_rank;
    for (int e = g.lane(); e < per_rank; e += g.size()) counts[e] = 0;
    g.sync();
    int got = 0;
    const int source = i / parts, part = i % parts;
    const Status s = decode_accept(g, f, a, source, got, part);
    if (keeps_step(s))
      keep_finding(found, s);
    else
      MOE_TRY(s);
    if (s.ok())
      decode_number(g, f, a, source, channel_begin(got, part, parts), channel_begin(got, part + 1, parts),
                    counts);
  }
  if (found.code == Code::refused && g.lane() == 0) w.memory.clock->refused = a.turn.epoch;
  MOE_TRY(barrier.wait(g));
  // There is no combine for a refused dispatch.
  const bool refused = a.turn.refused() || w.memory.clock->refused == a.turn.epoch;
  set_stage(g, index, w.memory.clock, a.turn.epoch, refused ? DecodeStage::over : DecodeStage::received);
  for (int i = index; i < slices && found.ok() && !refused; i += groups) {
    const int source = i / parts, part = i % parts, got = a.turn.got[source];
    const int begin = channel_begin(got, part, parts), end = channel_begin(got, part + 1, parts);
    decode_shift_places(g, f, a, source, begin, end, w.memory.slice_counts, i, slices);
    MOE_TRY(decode_pack(g, f, a, source, begin, end));
  }
  return found;
}

// Checks that the ids are those of the dispatch, and keeps the weights for the sums.
template <Group G>
MOE_HD Status take_weights(G g, const DecodeCombineWork& w, const DecodeTurn& turn, int k_max, int index,
                           int groups) {
  Status bad;
  const int picks = turn.tokens * k_max;  // fewer than 2^30: both banks have a place for each
  for (int i = index * g.size() + g.lane(); i < picks && bad.ok(); i += groups * g.size()) {
    const int64_t id = w.ids64 ? w.ids64[i] : w.ids32[i];
    if (id != turn.ids[i] && w.args.d.served(id) != turn.ids[i])
      bad = bad_pick(BadInput::other_ids, i / k_max, id);
    turn.weights[i] = w.weights ? w.weights[i] : 1.0f;
  }
  return first_failure(g, bad);
}

// Copies every groups-th row of every local expert into the window.
template <Group G, Fabric<G> F>
MOE_HD void stage_rows(G g, F f, const DecodeCombineWork& w, const DecodeTurn& turn, int index, int groups) {
  const DecodeView& d = w.args.d;
  const uint64_t row_bytes = d.shape.combine_row_bytes(),
                 per_expert = decode_rows_per_expert(d.geometry, d.shape);
  const int64_t* counts = f.window(d.geometry.local(), d.counts(turn.bank));
  char* rows = f.window(d.geometry.local(), d.rows(turn.bank));
  for (int e = 0; e < d.experts_per_rank(); ++e)
    for (int64_t i = index; i < counts[e]; i += groups) {
      const uint64_t at = (e * per_expert + i) * row_bytes;
      f.copy_row(g, rows + at, w.staged + at, row_bytes);
      if (g.lane() == 0) ++f.counters().staged_rows;
    }
}

template <Group G, Fabric<G> F, GroupBarrier<G> Barrier>
MOE_HD Status answer_group(G g, F f, Barrier barrier, const DecodeCombineWork& w, DecodeCombineArgs& a,
                           int index, int groups) {
  const DecodeView& d = a.d;
  const int size = d.geometry.size, parts = parts_of_source(d, groups);
  MOE_TRY(expect_stage(g, index, w.memory.clock, a.turn.epoch, DecodeStage::received));
  if (a.refused == Why::none && !take_weights(g, w, a.turn, d.shape.top_k, index, groups).ok() &&
      g.lane() == 0)
    w.memory.clock->unanswered = a.turn.epoch;
  if (w.staged) {
    stage_rows(g, f, w, a.turn, index, groups);
    MOE_TRY(barrier.wait(g));
  }
  if (a.refused == Why::none && (a.turn.weighted || d.geometry.nodes() > 1))
    for (int i = index; i < size * parts; i += groups) {
      const int source = (d.geometry.rank + 1 + i / parts) % size, got = a.turn.got[source];
      decode_answer(g, f, a, source, channel_begin(got, i % parts, parts),
                    channel_begin(got, i % parts + 1, parts));
    }
  MOE_TRY(barrier.wait(g));  // no flag is sent before all ids have been checked
  if (w.memory.clock->unanswered == a.turn.epoch && a.refused == Why::none) a.refused = Why::picks;
  for (int step = 1 + index; step <= size; step += groups)
    decode_reply(g, f, a, (d.geometry.rank + step) % size);
  set_stage(g, index, w.memory.clock, a.turn.epoch, DecodeStage::answered);
  if (g.lane() == 0 && index == 0) ++f.counters().calls;
  return {};
}

template <Group G, Fabric<G> F>
MOE_HD Status sum_group(G g, F f, const DecodeCombineWork& w, const DecodeCombineArgs& a, int index,
                        int groups) {
  const int tokens = a.turn.tokens, begin = channel_begin(tokens, index, groups),
            end = channel_begin(tokens, index + 1, groups);
  MOE_TRY(expect_stage(g, index, w.memory.clock, a.turn.epoch, DecodeStage::answered));
  Status s = decode_wait_answers(g, f, a, begin, end);
  if (s.ok() && a.refused == Why::none) s = decode_sum(g, f, a, begin, end);
  if (s.ok() || keeps_step(s)) set_stage(g, index, w.memory.clock, a.turn.epoch, DecodeStage::done);
  return s;
}

}  // namespace detail

template <Group G, Fabric<G> F, GroupBarrier<G> Barrier>
MOE_HD Status decode_dispatch_group(G g, F f, Barrier barrier, const DecodeDispatchWork& w, int index,
                                    int groups) {
  DecodeTurn turn = w.args.turn;
  turn.epoch = w.memory.clock->epoch + (w.sends ? 1 : 0);
  place_decode_turn(w.args.d, w.memory.tables + turn.parity() * w.memory.table_bytes, turn);
  bool refused = false;
  DecodeSendArgs a = w.args;
  a.turn = turn;
  if (w.sends) {
    MOE_TRY(detail::send_group(g, f, barrier, w, a, index, groups, refused));
    if (refused) turn.mode = kRefusedMode;
  } else {
    MOE_TRY(detail::expect_stage(g, index, w.memory.clock, turn.epoch, DecodeStage::sent));
  }
  // After a refusal the receive phase runs now, because the caller gets no hook to run it later.
  if (!w.receives && !refused) return {};
  const Status s = detail::receive_group(g, f, barrier, w, DecodeReceiveArgs{w.args.d, turn}, index, groups);
  if (!refused) return s;  // a final failure follows from the refusal
  // The group with the invalid pick searches it again, because keeping it through the call takes registers.
  const int parts = detail::parts_of_tokens(a.turn, groups);
  if (index >= parts) return s;
  const Status bad = decode_check_picks(g, a, channel_begin(a.turn.tokens, index, parts),
                                        channel_begin(a.turn.tokens, index + 1, parts));
  return bad.ok() ? s : bad;
}

namespace detail {

// Gives `turn` the epoch of the call's ticket, and its tables.
MOE_HD inline Status find_turn(const DecodeCombineWork& w, DecodeTurn& turn) {
  const uint64_t latest = w.memory.clock->epoch;
  turn.epoch = w.memory.clock->turn[latest & 1].ticket == w.ticket ? latest : latest - 1;
  if (w.memory.clock->turn[turn.epoch & 1].ticket != w.ticket || turn.epoch == 0)
    return wrong_stage(DecodeStage::received, DecodeStage::idle);
  place_decode_turn(w.args.d, w.memory.tables + turn.parity() * w.memory.table_bytes, turn);
  return {};
}

}  // namespace detail

// Before a further combine of an epoch, which then is like the first. It is a call of its own, so that the
// first combine keeps its registers.
template <Group G, Fabric<G> F, GroupBarrier<G> Barrier>
MOE_HD Status decode_release_group(G g, F f, Barrier barrier, const DecodeCombineWork& w, int index,
                                   int groups) {
  DecodeTurn turn = w.args.turn;
  MOE_TRY(detail::find_turn(w, turn));
  MOE_TRY(detail::expect_stage(g, index, w.memory.clock, turn.epoch, DecodeStage::done));
  decode_release(g, f, w.args.d, turn, index, groups);
  MOE_TRY(decode_await_release(g, f, w.args.d, turn, index, groups));
  detail::set_stage(g, index, w.memory.clock, turn.epoch, DecodeStage::received);
  return barrier.wait(g);
}

template <Group G, Fabric<G> F, GroupBarrier<G> Barrier>
MOE_HD Status decode_combine_group(G g, F f, Barrier barrier, const DecodeCombineWork& w, int index,
                                   int groups) {
  DecodeCombineArgs a = w.args;
  MOE_TRY(detail::find_turn(w, a.turn));
  if (w.answers) MOE_TRY(detail::answer_group(g, f, barrier, w, a, index, groups));
  if (!w.sums && a.refused == Why::none) return {};
  const Status s = detail::sum_group(g, f, w, a, index, groups);
  if (a.refused == w.args.refused) return s;  // the ids were those of the dispatch
  const Status other =                        // looked for again, as the bad pick of a dispatch
      detail::take_weights(g, w, a.turn, a.d.shape.top_k, index, groups);
  return other.ok() ? s : other;
}

}  // namespace moecomm
