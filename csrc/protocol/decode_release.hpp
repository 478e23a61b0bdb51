// Decode, a further combine of an epoch: rule (D) of decode.hpp. Every rank of the step makes it.
//
//   decode_release        the source's side: tells the owners of its picks that it has received the combine
//                         before, so they may use its places again
//   decode_await_release  the owner's side: waits until all sources of its messages have said so
//
// A rank that refuses its part runs both, because its flag replaces that of the combine before.
#pragma once
#include "protocol/decode.hpp"

namespace moecomm {

// Tells every parts-th owner. The caller has received the combine before.
template <Group G, Fabric<G> F>
MOE_HD void decode_release(G g, F f, const DecodeView& d, const DecodeTurn& turn, int part = 0,
                           int parts = 1) {
  const int size = d.geometry.size, me = d.geometry.rank, parity = turn.parity();
  g.sync();
  if (g.lane() == 0)
    for (int step = part; step < size; step += parts) {
      const int r = (me + 1 + step) % size;
      if (turn.sent[r] == 0) continue;
      const uint64_t flag = make_answer_flag(turn.epoch, turn.combine, 0, Why::none),
                     add = flag - turn.released_flag[r];
      turn.released_flag[r] = flag;
      if (d.same_node(r))
        f.signal_node(d.local(r), d.released_flag(parity, d.geometry.local()), add);
      else
        f.signal_rail(r, d.remote_released_flag(parity, me), add);
    }
  g.sync();
}

// Waits for every parts-th source.
template <Group G, Fabric<G> F>
MOE_HD Status decode_await_release(G g, F f, const DecodeView& d, const DecodeTurn& turn, int part = 0,
                                   int parts = 1) {
  return leader(g, [&] {
    const uint64_t at_least = make_answer_flag(turn.epoch, turn.combine, 0, Why::none);
    const int parity = turn.parity();
    for (int r = part; r < d.geometry.size; r += parts) {
      if (turn.got[r] == 0) continue;
      MOE_TRY(d.same_node(r) ? f.wait_node(d.released_flag(parity, d.local(r)), at_least, Phase::done, r)
                             : f.wait_rail(d.remote_released_flag(parity, r), at_least, Phase::done, r));
    }
    return Status{};
  });
}

}  // namespace moecomm
