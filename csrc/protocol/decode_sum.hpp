// Decode combine, the source's side.
//
//   decode_wait_answers  waits for all owners of its tokens' picks, or of the picks of tokens [begin, end)
//   decode_sum           tokens [begin, end): y[t] = sum of weight * row in top-k order, in FP32. Weighted
//                        answers are summed in the order of each owner's first pick.
#pragma once
#include "protocol/decode.hpp"
#include "protocol/decode_verify.hpp"

namespace moecomm {

namespace detail {

// One lane. After a mismatch or a refusal it still waits for the other flags, so that the ranks stay in step.
template <LaneFabric F>
MOE_HD Status wait_answer(F f, const DecodeCombineArgs& a, int rank, Status& found) {
  const DecodeView& d = a.d;
  const int parity = a.turn.parity();
  const uint64_t at_least = make_answer_flag(a.turn.epoch, a.turn.combine, 0, Why::none);
  const CounterAt at =
      d.same_node(rank) ? d.answered_flag(parity, d.local(rank)) : d.remote_answered_flag(parity, rank);
  MOE_TRY(d.same_node(rank) ? f.wait_node(at, at_least, Phase::sum, rank)
                            : f.wait_rail(at, at_least, Phase::sum, rank));
  const uint64_t flag = *(d.same_node(rank) ? f.window(d.geometry.local(), at) : f.rail(at));
  if (answer_mode(flag) != a.mode && a.refused == Why::none)
    keep_finding(found, other_mode(answer_mode(flag), answer_refusal(flag), a.mode, Phase::sum, rank));
  return {};
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD Status decode_wait_answers(G g, F f, const DecodeCombineArgs& a) {
  return leader(g, [&] {
    Status found;
    for (int r = 0; r < a.d.geometry.size; ++r)
      if (a.turn.sent[r] > 0) MOE_TRY(detail::wait_answer(f, a, r, found));
    return found;
  });
}

template <Group G, Fabric<G> F>
MOE_HD Status decode_wait_answers(G g, F f, const DecodeCombineArgs& a, int begin, int end) {
  return leader(g, [&] {
    Status found;
    for (int64_t i = int64_t{begin} * a.d.shape.top_k; i < int64_t{end} * a.d.shape.top_k; ++i)
      if (a.turn.slot[i] >= 0) MOE_TRY(detail::wait_answer(f, a, a.d.owner(a.turn.ids[i]), found));
    return found;
  });
}

namespace detail {

// The terms of y[t]. Counts the rows that this rank reads from node peers.
template <Group G, Fabric<G> F>
MOE_HD Terms decode_terms(G g, F f, const DecodeCombineArgs& a, int t) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int parity = turn.parity(), k_max = d.shape.top_k, me = d.geometry.rank;
  const uint64_t row_bytes = d.shape.combine_row_bytes();
  Terms terms{&f.terms(t & 1)};
  int fetched = 0, from_peers = 0;
  int32_t fetched_place = 0;
  for (int k = 0; k < k_max; ++k) {
    const int64_t at = int64_t{t} * k_max + k;
    // Places may be in a peer's memory, so the lanes load them in parallel.
    if (!turn.weighted && k % g.size() == 0 && k + g.lane() < k_max) {
      const int expert = turn.ids[at + g.lane()], owner = expert < 0 ? me : d.owner(expert);
      if (expert >= 0 && d.same_node(owner))
        fetched_place = f.window(d.local(owner), d.places(parity, d.geometry.local()))[at + g.lane()];
    }
    const int64_t place = g.broadcast(fetched_place, k % g.size());
    if (turn.ids[at] < 0 || (turn.weighted && turn.slot[at] < 0)) continue;
    const int r = d.owner(turn.ids[at]);
    const float* weight = turn.weighted ? nullptr : turn.weights + at;
    if (!d.same_node(r)) {
      terms.add_wire(g, f.rail(d.answer(parity, t, k)), a.wire, d.shape.hidden, weight);
    } else if (turn.weighted) {
      terms.add_weighted(g, f.window(d.geometry.local(), d.sum(parity, t, k)), weight);
    } else {
      terms.add_weighted(g, f.window(d.local(r), d.rows(0)) + place * row_bytes, weight);
      ++fetched;
      from_peers += r != me;
    }
  }
  terms.fetch_weights();
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

namespace detail {

// One lane verifies the answers to token t against their owners' checksums.
template <LaneFabric F>
MOE_HD Status verify_answers(F f, const DecodeCombineArgs& a, int t) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int parity = turn.parity();
  for (int k = 0; k < d.shape.top_k; ++k) {
    const int64_t at = int64_t{t} * d.shape.top_k + k;
    if (turn.ids[at] < 0 || (turn.weighted && turn.slot[at] < 0)) continue;
    const int r = d.owner(turn.ids[at]);
    const char* answer;
    if (!d.same_node(r))
      answer = f.rail(d.answer(parity, t, k));
    else if (turn.weighted)
      answer = f.window(d.geometry.local(), d.sum(parity, t, k));
    else {
      const int32_t place = f.window(d.local(r), d.places(parity, d.geometry.local()))[at];
      answer = f.window(d.local(r), d.rows(0)) + place * d.shape.combine_row_bytes();
    }
    MOE_TRY(verify::answered_row(f, a, t, k, r, answer));
  }
  return {};
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD Status decode_sum(G g, F f, const DecodeCombineArgs& a, int begin, int end) {
  const uint64_t row_bytes = a.d.shape.combine_row_bytes();
  const float* no_bias = nullptr;
  for (int t = begin; t < end && a.d.check; ++t)
    MOE_TRY(leader(g, [&] { return detail::verify_answers(f, a, t); }));
  // The terms of the next row are listed before a row is summed, so that the fabric can prefetch them.
  const auto terms_of = [&](int t) {
    return t < end ? detail::decode_terms(g, f, a, t) : Terms{&f.terms(t & 1)};
  };
  Terms next = terms_of(begin);
  g.sync();
  for (int t = begin; t < end; ++t) {
    const Terms now = next;
    next = terms_of(t + 1);
    f.reduce_rows(g, a.y + t * row_bytes, now, &next, no_bias, a.d.shape.hidden, a.d.shape.dtype);
    g.sync();
  }
  return {};
}

}  // namespace moecomm
