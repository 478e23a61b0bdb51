// Decode combine, the source's side.
//
//   decode_wait_answers  all ranks that own an expert of one of its tokens
//   decode_sum           tokens [begin, end): y[t] = sum of weight * row in top-k order, in FP32; weighted
//                        answers: their sum, in the order of each rank's first pick
#pragma once
#include "protocol/decode.hpp"

namespace moecomm {

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
MOE_HD Terms decode_terms(G g, F f, const DecodeCombineArgs& a, int t) {
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
    const auto weight = [&] { return turn.weighted ? 1.0f : turn.weights[at]; };
    if (!d.near(r)) {
      terms.add_wire(g, f.rail(d.answer(parity, t, k)), a.wire, d.shape.hidden, weight);
    } else if (turn.weighted) {
      terms.add(g, f.window(d.geometry.local(), d.sum(parity, t, k)), weight);
    } else {
      const int64_t place = reinterpret_cast<const int32_t*>(f.window(d.local(r), d.places(parity, me)))[at];
      terms.add(g, f.window(d.local(r), d.rows(parity)) + place * row_bytes, weight);
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
  const float* no_bias = nullptr;
  // While one row is summed the next one's terms are known, so that the fabric can fetch them ahead.
  const auto terms_of = [&](int t) { return t < end ? detail::decode_terms(g, f, a, t) : Terms{&f.terms(t & 1)}; };
  Terms next = terms_of(begin);
  g.sync();
  for (int t = begin; t < end; ++t) {
    const Terms now = next;
    next = terms_of(t + 1);
    f.reduce_rows(g, a.y + t * row_bytes, now, &next, no_bias, a.d.shape.hidden, a.d.shape.dtype);
    g.sync();
  }
}

}  // namespace moecomm
