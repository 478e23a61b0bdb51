// Replicas chosen by the counts of all ranks. What travels in the dispatch's exchange are picks of logical
// experts, the same block to every node (DispatchArgs::asked); every rank then computes the same choice, so
// it knows how many rows every source sends to every slot without being told. How many rows cross a rail is
// another matter: it depends on which picks meet in a token. That a source tells its rail peers alone, ahead
// of those rows: a second announcement that nobody passes on.
//
//   announce, relay, await_counts   the exchange
//   picks_of                        what it has brought
//   announce                        the plan's blocks, once the slots are chosen      [asked is null from
//   here on] derive_tables  (all)            the tables that a relay of those blocks would have filled
#pragma once
#include "protocol/exchange.hpp"

namespace moecomm {

MOE_HD inline const int32_t* picks_of(const DispatchArgs& a, char* window, int source) {
  return detail::table_of(a, window, source) + a.b.count.picks;
}

// rows_to(source, counts): the source's rows for the slots of this node [E/N], by the choice.
template <Group G, Fabric<G> F, class Rows>
MOE_HD Status derive_tables(G g, F f, const DispatchArgs& a, Rows rows_to) {
  const BufferView& b = a.b;
  char* window = f.window(b.geometry.local());
  for (int s = g.lane(); s < b.geometry.size; s += g.size()) {
    int32_t* table = detail::table_of(a, window, s);
    table[b.count.signature] = a.plan.call.signature();  // they agreed, or there was no choice
    table[b.count.cached] = 0;
    table[b.count.word] = detail::exchange_word(a);
    rows_to(s, table + b.count.experts);
  }
  g.sync();  // a rail peer's word is its own
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
