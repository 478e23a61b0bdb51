// Decode's four phases, as a sequence of roles on one lane.
#pragma once
#include "protocol/decode_answer.hpp"
#include "protocol/decode_receive.hpp"
#include "protocol/decode_release.hpp"
#include "protocol/decode_send.hpp"
#include "protocol/decode_sum.hpp"
#include "schedule/timed.hpp"

namespace moecomm {

// Sets the count of every local expert to zero.
template <Group G, Fabric<G> F>
int64_t* decode_clear_counts(G g, F f, const DecodeReceiveArgs& a) {
  int64_t* counts = f.window(a.d.geometry.local(), a.d.counts(a.turn.bank));
  for (int e = g.lane(); e < a.d.experts_per_rank(); e += g.size()) counts[e] = 0;
  g.sync();
  return counts;
}

template <Group G, Fabric<G> F>
Status run_decode_send(G g, F f, const DecodeSendArgs& a) {
  if (a.refused == Why::none)
    timed(g, f, RoleKind::decode_send, [&] { decode_send(g, f, a, 0, a.turn.tokens); });
  timed(g, f, RoleKind::decode_announce, [&] { decode_announce(g, f, a, a.refused); });
  return {};
}

// Detects sources that make the call with other arguments or refuse their part. It still waits for all other
// sources (rule A of decode.hpp).
template <Group G, Fabric<G> F>
Status run_decode_receive(G g, F f, const DecodeReceiveArgs& a) {
  Status found;
  int64_t* counts = decode_clear_counts(g, f, a);
  for (int source = 0; source < a.d.geometry.size; ++source) {
    int got = 0;
    const Status s =
        timed(g, f, RoleKind::decode_accept, [&] { return decode_accept(g, f, a, source, got); });
    if (keeps_step(s))
      detail::keep_finding(found, s);
    else
      MOE_TRY(s);
    if (!found.ok()) continue;
    MOE_TRY(timed(g, f, RoleKind::decode_pack, [&] {
      decode_number(g, f, a, source, 0, got, counts);
      return decode_pack(g, f, a, source, 0, got);
    }));
  }
  return found;
}

// Before a further combine of an epoch: the experts' rows must not be written before it returns.
template <Group G, Fabric<G> F>
Status run_decode_release(G g, F f, const DecodeView& d, const DecodeTurn& turn) {
  return timed(g, f, RoleKind::decode_release, [&] {
    decode_release(g, f, d, turn);
    return decode_await_release(g, f, d, turn);
  });
}

template <Group G, Fabric<G> F>
Status run_decode_combine_send(G g, F f, const DecodeCombineArgs& a) {
  const int size = a.d.geometry.size;
  timed(g, f, RoleKind::decode_answer, [&] {
    for (int step = 1; step <= size; ++step) {
      const int source = (a.d.geometry.rank + step) % size;
      if (a.refused == Why::none) decode_answer(g, f, a, source, 0, a.turn.got[source]);
      decode_reply(g, f, a, source);
    }
  });
  return {};
}

template <Group G, Fabric<G> F>
Status run_decode_combine_receive(G g, F f, const DecodeCombineArgs& a) {
  MOE_TRY(timed(g, f, RoleKind::decode_wait, [&] { return decode_wait_answers(g, f, a); }));
  if (a.refused != Why::none) return {};
  return timed(g, f, RoleKind::decode_sum, [&] { return decode_sum(g, f, a, 0, a.turn.tokens); });
}

}  // namespace moecomm
