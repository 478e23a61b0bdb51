// Dispatch with replicas that are chosen by the counts of all ranks. The exchange carries counts of picks of
// logical experts, the same block to every node (DispatchArgs::logical_blocks). Every rank then computes the
// same choice, so it knows how many rows every source sends to every expert slot without a further exchange.
// It does not know how many rows cross a rail, because that depends on which picks belong to the same token.
// Each source sends this number to its rail peers in a second announcement, ahead of the rows, and no rank
// relays it.
//
//   announce, relay, await_counts   the exchange
//   picks_of                        the counts that it has brought
//   announce                        the plan's blocks, after the slots are chosen; `logical_blocks` is null
//                                   from here on
//   derive_tables  (all)            fills the tables that a relay of those blocks would have filled
#pragma once
#include "protocol/exchange.hpp"

namespace moecomm {

MOE_HD inline const int32_t* picks_of(const DispatchArgs& a, char* window, int source) {
  return detail::table_of(a, window, source) + a.b.count.picks;
}

// rows_to(source, counts) writes the number of the source's rows for each expert slot of this node [E/N].
template <Group G, Fabric<G> F, class Rows>
MOE_HD Status derive_tables(G g, F f, const DispatchArgs& a, Rows rows_to) {
  const BufferView& b = a.b;
  char* window = f.window(b.geometry.local());
  for (int s = g.lane(); s < b.geometry.size; s += g.size()) {
    int32_t* table = detail::table_of(a, window, s);
    table[b.count.signature] = a.plan.call.signature();  // all ranks agree, else no choice was made
    table[b.count.cached] = 0;
    table[b.count.word] = detail::exchange_word(a);
    rows_to(s, table + b.count.experts);
  }
  g.sync();  // the rail peers' words and channel counts come from their own blocks
  for (int n = 0; n < b.geometry.nodes(); ++n) {
    const int32_t* block = nullptr;
    MOE_TRY(detail::await_block(g, f, a, n, block));
    int32_t* table = detail::table_of(a, window, b.geometry.rail_rank(n));
    if (g.lane() == 0) table[b.count.word] = block[b.count.word];
    for (int c = g.lane(); c < b.shape.channels; c += g.size())
      table[b.count.channels + c] = block[b.count.channels + c];
  }
  g.sync();
  return {};
}

}  // namespace moecomm
