// Decode combine.
//
//   decode_answer        (owner)   for one source: its tokens' rows. Plain: put over the rail, or left where they
//                                  are for node peers to read. Weighted: summed to one row per token first.
//   decode_wait_answers  (source)  all ranks that own an expert of one of its tokens
//   decode_sum           (source)  tokens [begin, end): y[t] = sum of weight * row in top-k order, in FP32;
//                                  weighted: the sum of the answers, in the order of each rank's first pick
#pragma once
#include "protocol/decode.hpp"

namespace moecomm {

namespace detail {

// One message's rows, weighted and summed, in the order of its picks.
template <Group G, class F>
MOE_HD Terms decode_answer_terms(G g, F f, const DecodeCombineArgs& a, const DecodeHeader* header, const int32_t* places, int which) {
  const DecodeView& d = a.d;
  Terms terms{&f.terms(which)};
  for (int k = 0; k < d.shape.top_k; ++k) {
    const DecodePick pick = header->pick()[k];
    if (pick.expert < 0 || d.owner(pick.expert) != d.geometry.rank) continue;
    terms.add(g, a.rows + places[int64_t{header->token} * d.shape.top_k + k] * d.shape.combine_row_bytes(), [&] { return pick.weight; });
  }
  terms.close_group();
  return terms;
}

}  // namespace detail

template <Group G, class F>
MOE_HD void decode_answer(G g, F f, const DecodeCombineArgs& a, int source) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int parity = turn.parity(), own = d.geometry.local(), k_max = d.shape.top_k, me = d.geometry.rank;
  const bool near = d.near(source);
  const uint64_t row_bytes = d.shape.combine_row_bytes(), header_bytes = decode_header_bytes(k_max);
  const int32_t* places = reinterpret_cast<const int32_t*>(f.window(own, d.places(parity, source)));
  HopCounters& hop = near ? f.counters().node : f.counters().rail;
  uint64_t answers = 0;
  for (int i = 0; i < turn.got[source] && (turn.weighted || !near); ++i) {
    char* message = detail::decode_message(f, d, turn, source, i);
    const DecodeHeader* header = reinterpret_cast<const DecodeHeader*>(message);
    const int64_t token = header->token;
    int first = -1;
    for (int k = 0; k < k_max; ++k) {
      const int expert = header->pick()[k].expert;
      if (expert < 0 || d.owner(expert) != me) continue;
      if (first < 0) first = k;
      if (turn.weighted) continue;
      if (g.lane() == 0) f.put(source, d.answer(parity, token, k), a.rows + places[token * k_max + k] * row_bytes, row_bytes);
      ++answers;
    }
    if (!turn.weighted || first < 0) continue;
    char* sum = near ? f.window(d.local(source), d.sum(parity, token, first)) : message + header_bytes;
    const Terms terms = detail::decode_answer_terms(g, f, a, header, places, 0);
    g.sync();
    f.reduce_rows(g, sum, terms, static_cast<const Terms*>(nullptr), static_cast<const float*>(nullptr), d.shape.hidden, d.shape.dtype);
    g.sync();
    if (!near && g.lane() == 0) f.put(source, d.answer(parity, token, first), sum, row_bytes);
    ++answers;
  }
  g.sync();
  if (g.lane() == 0) {
    hop.logical_rows += answers;
    hop.logical_bytes += answers * row_bytes;
    hop.physical_rows += source != me ? answers : 0;
    hop.physical_bytes += source != me ? answers * row_bytes : 0;
    if (turn.got[source] > 0) {
      const uint64_t flag = make_flag(turn.epoch, a.mode, turn.got[source]), add = flag - turn.answered_flag[source];
      turn.answered_flag[source] = flag;
      if (near) f.signal_node(d.local(source), d.answered_flag(parity, own), add);
      else f.signal_rail(source, d.remote_answered_flag(parity, me), add);
    }
  }
  g.sync();
}

template <Group G, class F>
MOE_HD Status decode_wait_answers(G g, F f, const DecodeCombineArgs& a) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int parity = turn.parity(), own = d.geometry.local();
  const uint64_t at_least = make_flag(turn.epoch, 0, 0);
  return leader(g, [&] {
    Status mismatch;   // found on the way: the other flags are awaited all the same, so the ranks stay in step
    for (int r = 0; r < d.geometry.size; ++r) {
      if (turn.sent[r] == 0) continue;
      const uint64_t at = d.near(r) ? d.answered_flag(parity, d.local(r)) : d.remote_answered_flag(parity, r);
      MOE_TRY(d.near(r) ? f.wait_node(at, at_least, Phase::sum, r) : f.wait_rail(at, at_least, Phase::sum, r));
      const int mode = flag_mode(*reinterpret_cast<const uint64_t*>(d.near(r) ? f.window(own, at) : f.rail(at)));
      if (mode != a.mode) mismatch = {Code::mismatch, Phase::sum, r, 0, static_cast<uint64_t>(a.mode), static_cast<uint64_t>(mode)};
    }
    return mismatch;
  });
}

namespace detail {

// The rows that make y[t]; counted where this rank fetches them itself.
template <Group G, class F>
MOE_HD Terms decode_sum_terms(G g, F f, const DecodeCombineArgs& a, int t) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int parity = turn.parity(), k_max = d.shape.top_k, me = d.geometry.rank;
  const uint64_t row_bytes = d.shape.combine_row_bytes();
  Terms terms{&f.terms(t & 1)};
  uint64_t fetched = 0, from_peers = 0;
  for (int k = 0; k < k_max; ++k) {
    const int64_t at = int64_t{t} * k_max + k;
    if (turn.ids[at] < 0 || (turn.weighted && turn.slot[at] < 0)) continue;
    const int r = d.owner(turn.ids[at]);
    if (!d.near(r)) {
      terms.add(g, f.rail(d.answer(parity, t, k)), [&] { return turn.weighted ? 1.0f : turn.weights[at]; });
    } else if (turn.weighted) {
      terms.add(g, f.window(d.geometry.local(), d.sum(parity, t, k)), [] { return 1.0f; });
    } else {
      const int64_t place = reinterpret_cast<const int32_t*>(f.window(d.local(r), d.places(parity, me)))[at];
      terms.add(g, f.window(d.local(r), d.rows(parity)) + place * row_bytes, [&] { return turn.weights[at]; });
      ++fetched;
      from_peers += r != me;
    }
  }
  terms.close_group();
  if (g.lane() != 0) return terms;
  HopCounters& hop = f.counters().node;
  hop.logical_rows += fetched;
  hop.logical_bytes += fetched * row_bytes;
  hop.physical_rows += from_peers;
  hop.physical_bytes += from_peers * row_bytes;
  return terms;
}

}  // namespace detail

template <Group G, class F>
MOE_HD void decode_sum(G g, F f, const DecodeCombineArgs& a, int begin, int end) {
  const uint64_t row_bytes = a.d.shape.combine_row_bytes();
  // While one row is summed the next one's terms are known, so that the fabric can fetch them ahead.
  Terms next = begin < end ? detail::decode_sum_terms(g, f, a, begin) : Terms{};
  g.sync();
  for (int t = begin; t < end; ++t) {
    const Terms now = next;
    next = t + 1 < end ? detail::decode_sum_terms(g, f, a, t + 1) : Terms{&f.terms(0)};
    f.reduce_rows(g, a.y + t * row_bytes, now, &next, static_cast<const float*>(nullptr), a.d.shape.hidden, a.d.shape.dtype);
    g.sync();
  }
}

}  // namespace moecomm
