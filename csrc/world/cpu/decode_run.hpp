// Decode's four phases as one rank of the CPU runs them.
#pragma once
#include "protocol/decode_answer.hpp"
#include "protocol/decode_receive.hpp"
#include "protocol/decode_send.hpp"
#include "protocol/decode_sum.hpp"

namespace moecomm {

template <Group G, class F>
Status run_decode_send(G g, F f, const DecodeSendArgs& a) {
  decode_send(g, f, a, 0, a.turn.tokens);
  decode_announce(g, f, a);
  return {};
}

// A source that disagrees about the call is found here; the others are still awaited (rule A of decode.hpp).
template <Group G, class F>
Status run_decode_receive(G g, F f, const DecodeReceiveArgs& a) {
  Status mismatch;
  for (int source = 0; source < a.d.geometry.size; ++source) {
    const Status s = decode_accept(g, f, a, source);
    if (s.code == Code::mismatch) mismatch = s;
    else MOE_TRY(s);
    if (mismatch.ok()) MOE_TRY(decode_pack(g, f, a, source));
  }
  return mismatch;
}

template <Group G, class F>
Status run_decode_combine_send(G g, F f, const DecodeCombineArgs& a) {
  const int size = a.d.geometry.size;
  for (int step = 1; step <= size; ++step) decode_answer(g, f, a, (a.d.geometry.rank + step) % size);
  return {};
}

template <Group G, class F>
Status run_decode_combine_receive(G g, F f, const DecodeCombineArgs& a) {
  MOE_TRY(decode_wait_answers(g, f, a));
  decode_sum(g, f, a, 0, a.turn.tokens);
  return {};
}

}  // namespace moecomm
