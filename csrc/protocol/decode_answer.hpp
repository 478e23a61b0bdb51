// Decode combine, the owner's side, for one source: decode_answer for slices of its messages, then
// decode_reply, which sends the flag.
//
// Plain answers: one row per pick. Inside a node the rows stay where the experts wrote them, and the source
// reads them there. To other nodes each row is put, quantized first if the wire format requires it. Weighted
// answers: one row per token, the weighted sum of its picks on this rank in the order of the picks, rounded
// (or quantized) once.
#pragma once
#include "protocol/decode.hpp"
#include "protocol/decode_verify.hpp"

namespace moecomm {

namespace detail {

template <Group G, Fabric<G> F>
MOE_HD Terms one_row(G g, F f, const char* row) {
  Terms terms{&f.terms(0)};
  terms.add(g, row, [] { return 1.0f; });
  terms.close_group();
  return terms;
}

// The weighted rows of the picks of a message whose experts are on this rank.
template <Group G, Fabric<G> F>
MOE_HD Terms picked_rows(G g, F f, const DecodeCombineArgs& a, const DecodeHeader* header,
                         const int32_t* experts, const int32_t* places) {
  const DecodeView& d = a.d;
  const int64_t bank = static_cast<int64_t>(a.turn.bank * d.packed_rows());
  Terms terms{&f.terms(0)};
  for (int k = 0; k < d.shape.top_k; ++k)
    if (experts[k] >= 0)
      terms.add_weighted(g, a.rows + (places[k] - bank) * d.shape.combine_row_bytes(),
                         &header->pick()[k].weight);
  terms.fetch_weights();
  terms.close_group();
  return terms;
}

// dst = the sum of the terms, rounded to the buffer's dtype or quantized. The caller syncs before it builds
// the list again.
template <Group G, Fabric<G> F>
MOE_HD void store_answer(G g, F f, const DecodeCombineArgs& a, char* dst, const Terms& terms, Wire wire) {
  const Shape& s = a.d.shape;
  const Terms* none = nullptr;
  const float* no_bias = nullptr;
  g.sync();
  if (wire == Wire::plain)
    f.reduce_rows(g, dst, terms, none, no_bias, s.hidden, s.dtype);
  else
    f.reduce_encode(g, dst, wire, terms, none, s.hidden, s.dtype);
  g.sync();
}

// One lane writes the checksums of the answers, which are where decode_answer left them.
template <LaneFabric F>
MOE_HD void sign_answers(F f, const DecodeCombineArgs& a, int source) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int parity = turn.parity(), own = d.geometry.local();
  const bool same_node = d.same_node(source);
  const Wire wire = same_node ? Wire::plain : a.wire;
  uint64_t* signs = f.window(own, d.signs(parity, source));
  for (int i = 0; i < turn.got[source]; ++i) {
    int32_t* note = arrived(d, turn, source, i);
    const int32_t* places = decode_places(f, d, turn, source, note);
    for (int k = 0, picks = 0; k < d.shape.top_k; ++k) {
      if (note[1 + k] < 0) continue;
      const char* answer;
      if (turn.weighted && same_node)
        answer = f.window(d.local(source), d.sum(parity, note[0], k));
      else if (turn.weighted)
        answer = decode_message(f, d, turn, source, i, note[0])->row(d.shape.top_k);
      else if (wire != Wire::plain)
        answer = f.window(own, d.coded(parity, source, i, picks++));
      else
        answer = a.rows + (places[k] - static_cast<int64_t>(turn.bank * d.packed_rows())) *
                              d.shape.combine_row_bytes();
      const int64_t pick = int64_t{note[0]} * d.shape.top_k + k;
      signs[pick] = verify::answer_checksum(turn, answer, d.shape.wire_bytes(wire), d.geometry.rank, pick);
      if (turn.weighted) break;
    }
  }
  if (!same_node)
    put(f, source, d.landed_signs(parity, d.geometry.rank), signs,
        uint64_t(d.shape.max_tokens) * d.shape.top_k);
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD void decode_answer(G g, F f, const DecodeCombineArgs& a, int source, int begin, int end) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int parity = turn.parity(), own = d.geometry.local(), k_max = d.shape.top_k, me = d.geometry.rank;
  const bool same_node = d.same_node(source);
  const Wire wire = same_node ? Wire::plain : a.wire;
  const uint64_t row_bytes = d.shape.combine_row_bytes(), answer_bytes = d.shape.wire_bytes(wire);
  const int64_t bank = static_cast<int64_t>(turn.bank * d.packed_rows());
  int answers = 0;
  for (int i = begin; i < end && (turn.weighted || !same_node); ++i) {
    int32_t* note = detail::arrived(d, turn, source, i);
    const int32_t token = note[0];
    const int32_t* places = detail::decode_places(f, d, turn, source, note);
    const auto put = [&](int k, const char* answer) {
      if (!same_node && g.lane() == 0) f.put(source, d.answer(parity, token, k), answer, answer_bytes);
      ++answers;
    };
    int first = -1, picks = 0;
    for (int k = 0; k < k_max; ++k) {
      if (note[1 + k] < 0) continue;
      if (first < 0) first = k;
      if (turn.weighted) continue;
      const char* answer = a.rows + (places[k] - bank) * row_bytes;
      if (wire != Wire::plain) {
        char* coded = f.window(own, d.coded(parity, source, i, picks));
        detail::store_answer(g, f, a, coded, detail::one_row(g, f, answer), wire);
        answer = coded;
      }
      put(k, answer);
      ++picks;
    }
    if (!turn.weighted || first < 0) continue;
    DecodeHeader* message = detail::decode_message(f, d, turn, source, i, token);
    char* sum = same_node ? f.window(d.local(source), d.sum(parity, token, first)) : message->row(k_max);
    detail::store_answer(g, f, a, sum, detail::picked_rows(g, f, a, message, note + 1, places), wire);
    put(first, sum);
  }
  g.sync();
  if (g.lane() != 0) return;
  HopCounters& hop = same_node ? f.counters().node : f.counters().rail;
  hop.logical_rows += answers;
  hop.logical_bytes += answers * answer_bytes;
  hop.physical_rows += source != me ? answers : 0;
  hop.physical_bytes += source != me ? answers * answer_bytes : 0;
}

// Sends the flag after all answers to a source, or the refusal instead of them. No flag is sent to a source
// that sent no messages.
template <Group G, Fabric<G> F>
MOE_HD void decode_reply(G g, F f, const DecodeCombineArgs& a, int source) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int parity = turn.parity();
  const bool refuses = a.refused != Why::none;
  if (d.check) f.finish_rows(g);
  g.sync();
  if (g.lane() == 0 && turn.got[source] > 0) {
    if (d.check && !refuses) detail::sign_answers(f, a, source);
    const uint64_t flag =
        make_answer_flag(turn.epoch, turn.combine, refuses ? kRefusedMode : a.mode, a.refused);
    const uint64_t add = flag - turn.answered_flag[source];
    turn.answered_flag[source] = flag;
    if (d.same_node(source))
      f.signal_node(d.local(source), d.answered_flag(parity, d.geometry.local()), add);
    else
      f.signal_rail(source, d.remote_answered_flag(parity, d.geometry.rank), add);
  }
  g.sync();
}

}  // namespace moecomm
