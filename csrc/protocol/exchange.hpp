// The exchange of counts. From the counts every rank computes the final place of every row.
//
//   announce  (source)   sends count blocks to the rail peers: "I am in the call, and will send these rows"
//   relay     (gateway)  passes each source's count block to every rank of the node, with its arena offer
//   place     (all)      prefix sums: the final row of everything that this rail's sources send to this node
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/verify.hpp"

namespace moecomm {

// Which half of the memory for count blocks the latest announcement uses. A dispatch that exchanges twice
// alternates between two halves, so that the next exchange never overwrites a half that a rank still reads.
MOE_HD inline int count_half(const DispatchArgs& a) {
  return a.b.shape.count_halves() == 1 ? 0 : static_cast<int>(a.consumed->blocks % 2);
}

// The count blocks that are announced: [N, ints]. They must not change until the call has completed.
MOE_HD inline int32_t* blocks_of(const DispatchArgs& a) {
  return a.logical_blocks ? a.logical_blocks : a.plan.blocks;
}

namespace detail {

MOE_HD inline int32_t exchange_word(const DispatchArgs& a) {
  return call_word(a.consumed->enter, a.alone ? Verb::choose : Verb::dispatch);
}

}  // namespace detail

// begins: this is the first announcement of a dispatch (most have only one). A rank that refuses its part
// announces the refusal and no rows. It then executes the roles of a rank without tokens, so that its peers
// can complete the call.
template <Group G, Fabric<G> F>
MOE_HD void announce(G g, F f, const DispatchArgs& a, Why refused, bool begins = true) {
  const BufferView& b = a.b;
  const int own = b.geometry.node();
  const int nodes = b.geometry.nodes();
  const int32_t* blocks = blocks_of(a);
  if (g.lane() == 0) {
    ++a.consumed->enter;
    ++a.consumed->blocks;
    a.consumed->dispatches += begins;
  }
  for (int i = g.lane(); i < nodes * b.count.ints && refused != Why::none; i += g.size()) blocks_of(a)[i] = 0;
  g.sync();
  for (int n = g.lane(); n < nodes; n += g.size()) {
    int32_t* block = blocks_of(a) + n * b.count.ints;
    block[b.count.signature] = a.plan.call.signature();
    block[b.count.cached] = refused == Why::none ? a.cached : -static_cast<int32_t>(refused);
    block[b.count.word] = detail::exchange_word(a);
  }
  g.sync();
  const int half = count_half(a) * nodes * b.count.ints;
  if (!F::kPutsFromAnywhere && nodes > 1) {
    int32_t* out = f.rail(b.rail.blocks_out + half);
    copy_block(g, out, blocks, nodes * b.count.ints);
    f.finish_rows(g);
    blocks = out;
  }
  if (g.lane() == 0)
    for (int step = 1; step < nodes; ++step) {
      const int n = (own + step) % nodes;
      put(f, n, b.rail.blocks + (half + own * b.count.ints), blocks + n * b.count.ints, b.count.ints);
      f.signal_rail(n, b.rail.enter + own, 1);
    }
  g.sync();
}

namespace detail {

// Waits for the count block of node n's rail peer.
template <Group G, Fabric<G> F>
MOE_HD Status await_block(G g, F f, const DispatchArgs& a, int n, const int32_t*& block) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), nodes = b.geometry.nodes();
  if (n != own)
    MOE_TRY(leader(g, [&] {
      return f.wait_rail(b.rail.enter + n, a.consumed->enter, Phase::announce, b.geometry.rail_rank(n));
    }));
  block = n == own ? blocks_of(a) + n * b.count.ints
                   : f.rail(b.rail.blocks) + (int64_t{count_half(a)} * nodes + n) * b.count.ints;
  return {};
}

MOE_HD inline int32_t* table_of(const DispatchArgs& a, char* window, int source) {
  return a.b.node.tables.in(window) + (int64_t{count_half(a)} * a.b.geometry.size + source) * a.b.count.ints;
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD Status relay(G g, F f, const DispatchArgs& a, Offer offer) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), nodes = b.geometry.nodes(), p = b.geometry.ranks_per_node;
  for (int step = 0; step < nodes; ++step) {
    const int n = (own + step) % nodes;
    const int32_t* block = nullptr;
    MOE_TRY(detail::await_block(g, f, a, n, block));
    for (int local = 0; local < p; ++local)
      copy_block(g, detail::table_of(a, f.window(local), b.geometry.rail_rank(n)), block, b.count.ints);
  }
  if (g.lane() == 0)
    for (int local = 0; local < p; ++local) f.window(local, b.node.offers)[b.geometry.local()] = offer;
  g.sync();
  if (g.lane() == 0) {
    ++a.consumed->counts;
    ++f.counters().exchanges;
    for (int local = 0; local < p; ++local) f.signal_node(local, b.node.counts + b.geometry.local(), 1);
  }
  return {};
}

// Waits until the count blocks of all ranks for the latest exchange have arrived.
template <Group G, Fabric<G> F>
MOE_HD Status await_counts(G g, F f, const DispatchArgs& a) {
  const Geometry& geo = a.b.geometry;
  return leader(g, [&] {
    for (int i = 0; i < geo.ranks_per_node; ++i)
      MOE_TRY(
          f.wait_node(a.b.node.counts + i, a.consumed->counts, Phase::counts, geo.rank_at(geo.node(), i)));
    return Status{};
  });
}

namespace detail {

// The verdict on the call: the first rank that refuses its part permanently; else the first that needs larger
// memory; else the first whose call differs from this rank's. Either all ranks find the same refusal, or none
// does. A rank with another call word makes another call and will never take part in this one.
MOE_HD inline Verdict agreement(const DispatchArgs& a, char* window) {
  const CountLayout& count = a.b.count;
  const int32_t word = exchange_word(a), signature = a.plan.call.signature();
  Verdict found{};
  for (int s = 0; s < a.b.geometry.size; ++s) {
    const int32_t* table = table_of(a, window, s);
    if (table[count.word] != word)
      return make_verdict(Code::out_of_step, s, verbs_detail(verb_of(word), Verb::unknown),
                          static_cast<uint32_t>(word), static_cast<uint32_t>(table[count.word]));
    const Why why = table[count.cached] < 0 ? static_cast<Why>(-table[count.cached]) : Why::none;
    const bool grows = found.detail == number(Why::grow) && why != Why::grow;
    if (why != Why::none && (found.code != Code::refused || grows))
      found = make_verdict(Code::refused, s, number(why));
    if (found.ok() && (table[count.signature] != signature || table[count.cached] != a.cached))
      found = make_verdict(Code::mismatch, s);
  }
  return found;
}

// Prefix sums over sources and experts: where the rows of each source of this rail begin, on every rank of
// the node. The lanes divide the experts, then the ranks, then the experts (or ranks) of the node. Ends with
// a sync.
template <Group G>
MOE_HD void place_rows(G g, const DispatchArgs& a, char* window) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const bool by_rank = a.plan.call.layout == RowLayout::rank;
  const int p = geo.ranks_per_node, per_rank = b.experts_per_rank(), per_node = b.experts_per_node();
  const int own_first = geo.local() * per_rank;
  const int64_t alignment = a.plan.call.alignment;
  const auto total = [&](int field) {
    int32_t rows = 0;
    for (int s = 0; s < geo.size; ++s) rows += table_of(a, window, s)[field];
    return rows;
  };
  // `row` is the first row of `field`. The rows of the sources follow in ascending order.
  const auto follow = [&](int field, int index, int stride, int32_t row) {
    for (int s = 0; s < geo.size; ++s) {
      if (s % p == geo.local()) a.base[s / p * stride + index] = row;
      row += table_of(a, window, s)[field];
    }
    return row;
  };
  for (int e = g.lane(); e < per_node; e += g.size()) a.first[e] = total(b.count.experts + e);
  g.sync();
  for (int d = g.lane(); d < p; d += g.size()) {
    int64_t row = 0;
    for (int e = d * per_rank; e < (d + 1) * per_rank; ++e) {
      const int64_t rows = a.first[e], padded = (rows + alignment - 1) / alignment * alignment;
      if (d == geo.local()) {
        a.plan.tokens_per_expert[e - own_first] = rows;
        a.plan.rows_per_expert[e - own_first] = padded;
      }
      a.first[e] = static_cast<int32_t>(row);
      row += padded;
    }
    a.plan.rank_rows[d] = by_rank ? follow(b.count.ranks + d, d, p, 0) : row;
  }
  g.sync();
  if (!by_rank)
    for (int e = g.lane(); e < per_node; e += g.size()) follow(b.count.experts + e, e, per_node, a.first[e]);
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD Status place(G g, F f, const DispatchArgs& a) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const int p = geo.ranks_per_node, nodes = geo.nodes(), channels = b.shape.channels;
  MOE_TRY(await_counts(g, f, a));
  char* window = f.window(geo.local());
  Verdict verdict = detail::agreement(a, window);
  if (verdict.code == Code::out_of_step) return status_of(verdict);
  if (b.check && g.lane() == 0)
    for (int s = 0; s < geo.size; ++s) verify::keep_announced(a, detail::table_of(a, window, s), s);
  if (!a.cached && verdict.ok()) detail::place_rows(g, a, window);
  // Even if the call is refused, rows may arrive over the rail. Their number is known, so they can be
  // consumed.
  for (int n = g.lane(); n < nodes; n += g.size()) {
    const int32_t* rows = detail::table_of(a, window, geo.rail_rank(n)) + b.count.channels;
    int32_t* first = a.plan.channel_first + n * (channels + 1);
    first[0] = 0;
    for (int c = 0; c < channels; ++c) first[c + 1] = first[c] + rows[c];
    a.plan.rows[n] = first[channels];
  }
  const Offer* offers = b.node.offers.in(window);
  for (int d = g.lane(); d < p; d += g.size()) a.offers[d] = offers[d];
  g.sync();
  if (g.lane() == 0) {
    for (int d = 0; d < p; ++d) {
      const CallShape& call = a.plan.call;
      const int64_t rows = call.capacity >= 0 ? call.capacity : a.plan.rank_rows[d];
      const BlockLayout block = block_layout(rows, call, b.shape.top_k);
      a.needed[d] = block.bytes + output_layout(rows, b.shape).bytes;
      const int piece = a.offers[d].piece_for(a.needed[d]);
      a.target[d] = at_offset(block, a.offers[d].offset[piece]);
      if (!verdict.ok()) continue;
      const int rank = geo.rank_at(geo.node(), d);
      if (a.plan.rank_rows[d] > rows)
        verdict = make_verdict(Code::capacity, rank, number(Shortage::rows), a.plan.rank_rows[d], rows);
      else if (a.needed[d] > a.offers[d].bytes[piece])
        verdict = make_verdict(Code::capacity, rank, number(Shortage::bytes), a.needed[d],
                               a.offers[d].bytes[piece]);
    }
    *a.verdict = verdict;
  }
  g.sync();
  return {};
}

}  // namespace moecomm
