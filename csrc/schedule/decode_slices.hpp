// One rank's decode as many groups that run at once. World-blind like the protocol.
//
//   dispatch, send      list a slice of the tokens | meet | shift its slots, send it | meet | announce to
//   some ranks dispatch, receive   accept and number a part of a source's messages | meet | shift their
//   places, pack them combine, send       check the ids, answer a part of a source's messages | meet | reply
//   to some sources combine, receive    wait for what a slice of the tokens needs, sum it
//
// Which epoch a call is about is read from the rank's own memory, not told by the host: a captured graph is
// replayed any number of times, and every replay is a new epoch. The host names a dispatch by a ticket; the
// clock knows the epochs of the last two tickets. All groups read the clock when a call begins; the first of
// them writes it when all have met.
#pragma once
#include "protocol/decode_answer.hpp"
#include "protocol/decode_receive.hpp"
#include "protocol/decode_send.hpp"
#include "protocol/decode_sum.hpp"
#include "protocol/plan.hpp"

namespace moecomm {

enum class DecodeStage : int32_t { idle = 0, sent = 1, received = 2, answered = 3, done = 4 };

// In the rank's own memory, zero at first.
struct DecodeClock {
  struct Turn {
    uint64_t ticket;
    DecodeStage stage;  // the first group's alone
    int32_t bank;
  };
  uint64_t epoch;           // of the latest dispatch
  Turn turn[2];             // by parity
  uint64_t refused = 0;     // the latest epoch whose dispatch a rank has refused, as far as this one knows
  uint64_t unanswered = 0;  // the latest epoch whose combine this rank has refused
};

// All groups of the rank meet: what each did before is seen by all after. Status of a failed or late one.
template <class Meeting, class G>
concept GroupMeeting = requires(Meeting meeting, G g) {
  { meeting.meet(g) } -> std::same_as<Status>;
};

// Equal for all groups of a call. In `turn`, what the host knows: not the epoch, nor the tables.
struct DecodeDispatchWork {
  DecodeSendArgs args;
  uint64_t ticket = 0;
  DecodeClock* clock = nullptr;
  char* tables = nullptr;    // of both parities, place_decode_turn's
  uint64_t table_bytes = 0;  // of one
  int32_t* apart = nullptr;  // scratch, decode_scratch_ints
  bool sends = true, receives = true;
};

struct DecodeCombineWork {
  DecodeCombineArgs args;
  uint64_t ticket = 0;
  DecodeClock* clock = nullptr;
  char* tables = nullptr;
  uint64_t table_bytes = 0;
  const int64_t* ids64 = nullptr;  // [T, K] must be those of the dispatch; one of the two
  const int32_t* ids32 = nullptr;
  const float* weights = nullptr;  // null: 1
  const char* staged = nullptr;    // the experts' rows where they are not in the window: those that are there
                                   // are copied to args.rows
  bool answers = true, sums = true;
};

MOE_HD constexpr uint64_t decode_scratch_ints(const Geometry& g, const Shape& s, int groups) {
  const uint64_t per_rank = s.num_experts / g.size, size = g.size;
  return (groups > g.size ? groups : g.size) * (per_rank > size ? per_rank : size);
}

namespace detail {

// Messages of a source in a slice: fewer make more slices to add up.
constexpr int kMessagesPerSlice = 8;

MOE_HD inline Status out_of_turn(DecodeStage needed, DecodeStage is) {
  return {
      Code::invalid, Phase::none, -1, kOutOfTurn, static_cast<uint64_t>(needed), static_cast<uint64_t>(is)};
}

// Rules A, B and C of decode.hpp for the dispatch of `epoch` into `bank`.
MOE_HD inline Status check_turns(const DecodeClock& clock, uint64_t epoch, int bank) {
  const DecodeClock::Turn &last = clock.turn[(epoch - 1) & 1], &before = clock.turn[epoch & 1];
  if (last.stage == DecodeStage::sent) return out_of_turn(DecodeStage::received, last.stage);
  if (before.stage == DecodeStage::answered) return out_of_turn(DecodeStage::done, before.stage);
  if (last.stage == DecodeStage::answered && last.bank == bank)
    return out_of_turn(DecodeStage::done, last.stage);
  return {};
}

// The first group alone looks at stages.
template <Group G>
MOE_HD Status expect_stage(G g, int index, DecodeClock* clock, uint64_t epoch, DecodeStage needed) {
  if (index != 0) return {};
  return leader(g, [&] {
    const DecodeStage is = clock->turn[epoch & 1].stage;
    return is == needed ? Status{} : out_of_turn(needed, is);
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

template <Group G, Fabric<G> F, GroupMeeting<G> Meeting>
MOE_HD Status send_seat(G g, F f, Meeting meeting, const DecodeDispatchWork& w, const DecodeSendArgs& a,
                        int index, int groups, Status& bad, bool& refused) {
  const int size = a.d.geometry.size, tokens = a.turn.tokens,
            parts = tokens < 1        ? 1
                    : tokens < groups ? tokens
                                      : groups;
  const int begin = channel_begin(tokens, index, parts), end = channel_begin(tokens, index + 1, parts);
  if (index == 0) MOE_TRY(leader(g, [&] { return check_turns(*w.clock, a.turn.epoch, a.turn.bank); }));
  if (index < parts) bad = decode_list(g, a, begin, end, w.apart + int64_t{index} * size);
  if (!bad.ok() && g.lane() == 0) w.clock->refused = a.turn.epoch;
  MOE_TRY(meeting.meet(g));  // nothing moves before every pick is found good
  refused = a.refused != Why::none || w.clock->refused == a.turn.epoch;
  if (index < parts && !refused) {
    decode_shift_slots(g, a, begin, end, w.apart, index, parts);
    decode_send(g, f, a, begin, end);
  }
  MOE_TRY(meeting.meet(g));
  decode_announce(g, f, a,
                  !refused                 ? Why::none
                  : a.refused != Why::none ? a.refused
                                           : Why::picks,
                  index, groups);
  if (index == 0 && g.lane() == 0) {
    w.clock->epoch = a.turn.epoch;
    w.clock->turn[a.turn.parity()] = {w.ticket, DecodeStage::sent, a.turn.bank};
  }
  if (g.lane() == 0 && index == 0) ++f.counters().calls;
  return {};
}

// A source that disagrees about the call, or refuses its part, is found by its parts; the others are still
// received (rule A).
template <Group G, Fabric<G> F, GroupMeeting<G> Meeting>
MOE_HD Status receive_seat(G g, F f, Meeting meeting, const DecodeDispatchWork& w, const DecodeReceiveArgs& a,
                           int index, int groups) {
  const DecodeView& d = a.d;
  const int per_rank = d.experts_per_rank(), parts = parts_of_source(d, groups),
            slices = d.geometry.size * parts;
  Status found;
  for (int i = index; i < slices; i += groups) {
    int32_t* counts = w.apart + int64_t{i} * per_rank;
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
  if (found.code == Code::refused && g.lane() == 0) w.clock->refused = a.turn.epoch;
  MOE_TRY(meeting.meet(g));
  const bool refused = a.turn.refused() || w.clock->refused == a.turn.epoch;  // nobody answers it then
  set_stage(g, index, w.clock, a.turn.epoch, refused ? DecodeStage::done : DecodeStage::received);
  for (int i = index; i < slices && found.ok() && !refused; i += groups) {
    const int source = i / parts, part = i % parts, got = a.turn.got[source];
    const int begin = channel_begin(got, part, parts), end = channel_begin(got, part + 1, parts);
    decode_shift_places(g, f, a, source, begin, end, w.apart, i, slices);
    MOE_TRY(decode_pack(g, f, a, source, begin, end));
  }
  return found;
}

// The ids are those of the dispatch; keeps the weights for the sums.
template <Group G>
MOE_HD Status take_weights(G g, const DecodeCombineWork& w, const DecodeTurn& turn, int k_max, int index,
                           int groups) {
  Status bad;
  const int64_t picks = int64_t{turn.tokens} * k_max;
  for (int64_t i = int64_t{index} * g.size() + g.lane(); i < picks && bad.ok();
       i += int64_t{groups} * g.size()) {
    const int64_t id = w.ids64 ? w.ids64[i] : w.ids32[i];
    if (id != turn.ids[i])
      bad = {Code::invalid,
             Phase::none,
             -1,
             kOtherIds,
             static_cast<uint64_t>(i / k_max),
             static_cast<uint64_t>(id)};
    turn.weights[i] = w.weights ? w.weights[i] : 1.0f;
  }
  return first_failure(g, bad);
}

// Every groups-th row of every own expert, into the window.
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

// An id that is not the dispatch's. A Status would take registers through all of combine.
struct OtherId {
  int64_t id = 0;
  int32_t token = -1;  // -1: there is none
};

template <Group G, Fabric<G> F, GroupMeeting<G> Meeting>
MOE_HD Status answer_seat(G g, F f, Meeting meeting, const DecodeCombineWork& w, DecodeCombineArgs& a,
                          int index, int groups, OtherId& other) {
  const DecodeView& d = a.d;
  const int size = d.geometry.size, parts = parts_of_source(d, groups);
  MOE_TRY(expect_stage(g, index, w.clock, a.turn.epoch, DecodeStage::received));
  if (a.refused == Why::none)
    if (const Status bad = take_weights(g, w, a.turn, d.shape.top_k, index, groups); !bad.ok())
      other = OtherId{static_cast<int64_t>(bad.got), static_cast<int32_t>(bad.expected)};
  if (other.token >= 0 && g.lane() == 0) w.clock->unanswered = a.turn.epoch;
  if (w.staged) {
    stage_rows(g, f, w, a.turn, index, groups);
    MOE_TRY(meeting.meet(g));
  }
  if (a.refused == Why::none && (a.turn.weighted || d.geometry.nodes() > 1))
    for (int i = index; i < size * parts; i += groups) {
      const int source = (d.geometry.rank + 1 + i / parts) % size, got = a.turn.got[source];
      decode_answer(g, f, a, source, channel_begin(got, i % parts, parts),
                    channel_begin(got, i % parts + 1, parts));
    }
  MOE_TRY(meeting.meet(g));  // answers count from their flag on: ids that are wrong are found before
  if (w.clock->unanswered == a.turn.epoch && a.refused == Why::none) a.refused = Why::picks;
  for (int step = 1 + index; step <= size; step += groups)
    decode_reply(g, f, a, (d.geometry.rank + step) % size);
  set_stage(g, index, w.clock, a.turn.epoch, DecodeStage::answered);
  if (g.lane() == 0 && index == 0) ++f.counters().calls;
  return {};
}

template <Group G, Fabric<G> F>
MOE_HD Status sum_seat(G g, F f, const DecodeCombineWork& w, const DecodeCombineArgs& a, int index,
                       int groups) {
  const int tokens = a.turn.tokens, begin = channel_begin(tokens, index, groups),
            end = channel_begin(tokens, index + 1, groups);
  MOE_TRY(expect_stage(g, index, w.clock, a.turn.epoch, DecodeStage::answered));
  Status s = decode_wait_answers(g, f, a, begin, end);
  if (s.ok() && a.refused == Why::none) s = decode_sum(g, f, a, begin, end);
  if (s.ok() || keeps_step(s)) set_stage(g, index, w.clock, a.turn.epoch, DecodeStage::done);
  return s;
}

}  // namespace detail

template <Group G, Fabric<G> F, GroupMeeting<G> Meeting>
MOE_HD Status decode_dispatch_seat(G g, F f, Meeting meeting, const DecodeDispatchWork& w, int index,
                                   int groups) {
  DecodeTurn turn = w.args.turn;
  turn.epoch = w.clock->epoch + (w.sends ? 1 : 0);
  place_decode_turn(w.args.d, w.tables + turn.parity() * w.table_bytes, turn);
  Status bad;
  bool refused = false;
  if (w.sends) {
    DecodeSendArgs a = w.args;
    a.turn = turn;
    MOE_TRY(detail::send_seat(g, f, meeting, w, a, index, groups, bad, refused));
    if (refused) turn.mode = kRefusedMode;
  } else {
    MOE_TRY(detail::expect_stage(g, index, w.clock, turn.epoch, DecodeStage::sent));
  }
  if (!w.receives && !refused)
    return {};  // a rank that refuses its part does so to the end: a hook would not come
  const Status s = detail::receive_seat(g, f, meeting, w, DecodeReceiveArgs{w.args.d, turn}, index, groups);
  return bad.ok() || is_final(s) ? s : bad;
}

template <Group G, Fabric<G> F, GroupMeeting<G> Meeting>
MOE_HD Status decode_combine_seat(G g, F f, Meeting meeting, const DecodeCombineWork& w, int index,
                                  int groups) {
  DecodeCombineArgs a = w.args;
  const uint64_t latest = w.clock->epoch;
  a.turn.epoch = w.clock->turn[latest & 1].ticket == w.ticket ? latest : latest - 1;
  if (w.clock->turn[a.turn.epoch & 1].ticket != w.ticket || a.turn.epoch == 0)
    return detail::out_of_turn(DecodeStage::received, DecodeStage::idle);
  place_decode_turn(a.d, w.tables + a.turn.parity() * w.table_bytes, a.turn);
  detail::OtherId other;
  if (w.answers) MOE_TRY(detail::answer_seat(g, f, meeting, w, a, index, groups, other));
  if (!w.sums && a.refused == Why::none) return {};
  const Status s = detail::sum_seat(g, f, w, a, index, groups);
  if (other.token < 0 || is_final(s)) return s;
  return {Code::invalid,
          Phase::none,
          -1,
          kOtherIds,
          static_cast<uint64_t>(other.token),
          static_cast<uint64_t>(other.id)};
}

}  // namespace moecomm
