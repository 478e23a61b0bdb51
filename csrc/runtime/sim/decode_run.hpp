// Decode's four phases in the sim world. The rank's workers process slices of the tokens, or sources,
// concurrently. Without workers, one lane runs all roles as in the cpu world.
#pragma once
#include "exec/lane.hpp"
#include "protocol/decode_answer.hpp"
#include "protocol/decode_receive.hpp"
#include "protocol/decode_send.hpp"
#include "protocol/decode_sum.hpp"
#include "runtime/sim/role_fibers.hpp"
#include "runtime/sim/run.hpp"
#include "schedule/decode_sequential.hpp"

namespace moecomm {

template <Fabric<Lane> F>
Status sim_decode_send(SimNet& net, F f, const DecodeSendArgs& a, int workers) {
  constexpr Lane g;
  net.spend(net.hardware().launch);
  MOE_TRY(sim_part(net, "list", [&] { return decode_list(g, a, 0, a.turn.tokens, a.turn.sent); }));
  if (workers == 0) return run_decode_send(g, f, a);
  RoleFibers roles(net, a.d.geometry.rank);
  for (int w = 0; w < workers; ++w)
    roles.start("decode send", w, [&, w] {
      decode_send(g, f, a, channel_begin(a.turn.tokens, w, workers),
                  channel_begin(a.turn.tokens, w + 1, workers));
      return Status{};
    });
  MOE_TRY(roles.join());
  return sim_part(net, "decode announce", [&] {
    decode_announce(g, f, a, a.refused);
    return Status{};
  });
}

// Prefetches the headers of messages. They are in the senders' memory, so reading them would miss the caches.
template <Fabric<Lane> F>
void expect_messages(F f, const DecodeReceiveArgs& a, int source) {
  constexpr int kMost = 4;  // headers of a source
  if (source >= a.d.geometry.size || a.d.same_node(source)) return;
  for (int slot = 0; slot < kMost && slot < a.d.shape.max_tokens; ++slot) {
    const DecodeHeader* header = detail::decode_message(f, a.d, a.turn, source, slot, 0);
    __builtin_prefetch(header);
    __builtin_prefetch(moved(header, 64));
  }
}

// The rank's main fiber accepts the sources in ascending order; workers pack what has been accepted.
template <Fabric<Lane> F>
Status sim_decode_receive(SimNet& net, F f, const DecodeReceiveArgs& a, int workers) {
  constexpr Lane g;
  const int size = a.d.geometry.size;
  if (workers == 0) return run_decode_receive(g, f, a);
  RoleFibers roles(net, a.d.geometry.rank);
  Milestone accepted(net);
  Status found, failed;
  for (int w = 0; w < workers; ++w)
    roles.start("decode pack", w, [&, w] {
      for (int source = w; source < size; source += workers) {
        accepted.wait(source + 1);
        if (found.ok() && failed.ok()) MOE_TRY(decode_pack(g, f, a, source, 0, a.turn.got[source]));
      }
      return Status{};
    });
  int64_t* counts = decode_clear_counts(g, f, a);
  sim_part(net, "decode accept", [&] {
    constexpr int kAhead = 8;
    for (int source = 0; source < size; ++source) {
      expect_messages(f, a, source + kAhead);
      int got = 0;
      const Status s = failed.ok() ? decode_accept(g, f, a, source, got) : failed;
      if (s.ok()) decode_number(g, f, a, source, 0, got, counts);
      if (keeps_step(s))
        detail::keep_finding(found, s);
      else if (!s.ok())
        failed = s;
      accepted.open(source + 1);
    }
    return Status{};
  });
  const Status packed = roles.join();
  MOE_TRY(failed);
  MOE_TRY(packed);
  return found;
}

template <Fabric<Lane> F>
Status sim_decode_combine_send(SimNet& net, F f, const DecodeCombineArgs& a, int workers) {
  constexpr Lane g;
  const int size = a.d.geometry.size;
  net.spend(net.hardware().launch);
  if (workers == 0) return run_decode_combine_send(g, f, a);
  RoleFibers roles(net, a.d.geometry.rank);
  for (int w = 0; w < workers; ++w)
    roles.start("decode answer", w, [&, w] {
      for (int step = 1 + w; step <= size; step += workers) {
        const int source = (a.d.geometry.rank + step) % size;
        if (a.refused == Why::none) decode_answer(g, f, a, source, 0, a.turn.got[source]);
        decode_reply(g, f, a, source);
      }
      return Status{};
    });
  return roles.join();
}

template <Fabric<Lane> F>
Status sim_decode_combine_receive(SimNet& net, F f, const DecodeCombineArgs& a, int workers) {
  constexpr Lane g;
  if (workers == 0) return run_decode_combine_receive(g, f, a);
  MOE_TRY(sim_part(net, "decode wait", [&] { return decode_wait_answers(g, f, a); }));
  if (a.refused != Why::none) return {};
  RoleFibers roles(net, a.d.geometry.rank);
  for (int w = 0; w < workers; ++w)
    roles.start("decode sum", w, [&, w] {
      return decode_sum(g, f, a, channel_begin(a.turn.tokens, w, workers),
                        channel_begin(a.turn.tokens, w + 1, workers));
    });
  return roles.join();
}

}  // namespace moecomm
