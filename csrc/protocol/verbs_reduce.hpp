// reduce: writes the sum of many ranks' segments to one rank. Each node sums its own segments, in FP32 and in
// ascending rank order, and sends one row over the rail. The root sums the nodes in ascending order.
// Contributions are read in place. The result does not depend on timing.
//
//   reduce_send     [gateways of contributors]  sums its node's segments, puts the sum to the root
//   reduce_sum      [root]                      sums its own node's segments and the other nodes' sums
//   reduce_release  [gateways, root]            signals "I have read your contribution"
//   reduce_finish   [contributors]              waits for that signal
//
// Sums of short segments share a slot. A gateway may be shape.slots() slots ahead of the root. In a call with
// several reductions every rank does its part in one after the other, in the order of the list. This cannot
// deadlock: all ranks of the first reduction that is not complete are at that reduction. Every channel does
// this with its own runs, concurrently with the other channels.
#pragma once
#include "protocol/verbs.hpp"

namespace moecomm {

constexpr int kMaxContributors = TermStore::kMax;  // contributors of one node, and nodes

namespace detail {

// The contributors of a node: [first, end) of the list.
struct NodeContributors {
  int32_t first = 0, end = 0;
  MOE_HD bool any() const { return first < end; }
};
MOE_HD inline NodeContributors node_contributors(const ReduceArgs& a, int node) {
  NodeContributors r;
  const int p = a.d.geometry.ranks_per_node;
  while (r.first < a.contributors.count && a.contributors.rank[r.first] / p < node) ++r.first;
  r.end = r.first;
  while (r.end < a.contributors.count && a.contributors.rank[r.end] / p == node) ++r.end;
  return r;
}

template <Group G, Fabric<G> F>
MOE_HD void add_node(G g, F f, const ReduceArgs& a, NodeContributors own, uint64_t there, Terms& terms) {
  for (int32_t r = own.first; r < own.end; ++r)
    terms.add(g, f.window(a.d.local_of(a.contributors.rank[r])) + there, [] { return 1.0f; });
  terms.close_group();
}

// At the root: sums one segment of run `run`. The other nodes' sums are `at` bytes behind the beginning of
// the run's slots.
template <Group G, Fabric<G> F>
MOE_HD void sum_nodes(G g, F f, const ReduceArgs& a, int channel, const Segment& x, uint64_t run,
                      uint64_t at) {
  const DomainView& d = a.d;
  Terms terms;
  terms.store = &f.terms(0);
  for (int n = 0; n < d.geometry.nodes(); ++n) {
    const NodeContributors from = node_contributors(a, n);
    if (!from.any()) continue;
    if (n == d.geometry.node()) {
      add_node(g, f, a, from, x.there, terms);
      continue;
    }
    const uint64_t slot = d.slot_offset(n, channel, a.consumed[channel].summed[n] + run);
    terms.add(g, f.rail(d.at.slots.moved(slot + at)), [] { return 1.0f; });
    terms.close_group();
  }
  g.sync();
  f.reduce_rows(g, x.here, terms, nullptr, nullptr, x.bytes / element_bytes(a.type), a.type);
  g.sync();
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD Status reduce_send(G g, F f, const ReduceArgs& a, int channel = 0) {
  const DomainView& d = a.d;
  const int node = d.geometry.node(), root_node = d.node_of(a.root);
  const detail::NodeContributors own = detail::node_contributors(a, node);
  if (d.same_node(a.root) || !own.any() || d.gateway(node, a.root) != d.geometry.rank) return {};
  const int size = element_bytes(a.type);
  const uint64_t slots = d.shape.slots();
  DomainConsumed* consumed = a.consumed + channel;
  uint64_t number = consumed->sent[root_node];
  detail::Moved moved;
  g.sync();
  MOE_TRY(detail::each_run(d, a.segments, channel, [&](int64_t i, int64_t end) -> Status {
    if (number >= slots)
      MOE_TRY(leader(g, [&] {
        return f.wait_rail(d.of_channel(d.at.taken, root_node, channel), number - slots + 1, Phase::reduce,
                           a.root);
      }));
    const Offset<char> slot = d.at.slots.moved(d.slot_offset(node, channel, number));
    char* direct = reach(f, a.root, slot);
    // The slot in slots_out is free as well, because its previous sums have been read.
    char* to = direct ? direct : f.rail(d.at.slots_out.moved(d.slot_offset(root_node, channel, number)));
    uint64_t bytes = 0;
    for (int64_t k = i; k < end; ++k) {
      const Segment& x = a.segments.segment[k];
      Terms terms;
      terms.store = &f.terms(0);
      detail::add_node(g, f, a, own, x.there, terms);
      g.sync();
      f.reduce_rows(g, to + bytes, terms, nullptr, nullptr, x.bytes / size, a.type);
      g.sync();
      bytes += x.bytes;
    }
    if (g.lane() == 0) {
      if (!direct) f.put(a.root, slot.value, to, bytes);
      f.signal_rail(a.root, d.of_channel(d.at.summed, node, channel), 1);
    }
    moved.add(a.segments, i, end);
    ++number;
    return {};
  }));
  if (g.lane() == 0) {
    consumed->sent[root_node] = number;
    detail::count_hop(f, d, consumed, a.root, moved.rows, moved.bytes);
    for (int32_t r = own.first; r < own.end; ++r)
      detail::count_hop(f, d, consumed, a.contributors.rank[r], moved.rows, moved.bytes);
  }
  g.sync();
  return {};
}

template <Group G, Fabric<G> F>
MOE_HD Status reduce_sum(G g, F f, const ReduceArgs& a, int channel = 0) {
  const DomainView& d = a.d;
  if (d.geometry.rank != a.root) return {};
  const int nodes = d.geometry.nodes();
  DomainConsumed* consumed = a.consumed + channel;
  const auto sums_for_me = [&](int n) {
    return n != d.geometry.node() && detail::node_contributors(a, n).any();
  };
  uint64_t run = 0;
  detail::Moved moved;
  MOE_TRY(detail::each_run(d, a.segments, channel, [&](int64_t i, int64_t end) -> Status {
    for (int n = 0; n < nodes; ++n)
      if (sums_for_me(n))
        MOE_TRY(leader(g, [&] {
          return f.wait_rail(d.of_channel(d.at.summed, n, channel), consumed->summed[n] + run + 1, Phase::sum,
                             d.gateway(n, a.root));
        }));
    uint64_t bytes = 0;
    for (int64_t k = i; k < end; ++k) {
      const Segment& x = a.segments.segment[k];
      detail::sum_nodes(g, f, a, channel, x, run, bytes);
      bytes += x.bytes;
    }
    if (g.lane() == 0)
      for (int n = 0; n < nodes; ++n)
        if (sums_for_me(n))
          f.signal_rail(d.gateway(n, a.root), d.of_channel(d.at.taken, d.geometry.node(), channel), 1);
    g.sync();
    moved.add(a.segments, i, end);
    ++run;
    return {};
  }));
  if (g.lane() == 0) {
    for (int n = 0; n < nodes; ++n)
      if (sums_for_me(n)) consumed->summed[n] += run;
    const auto [first, last] = detail::node_contributors(a, d.geometry.node());
    for (int32_t r = first; r < last; ++r)
      detail::count_hop(f, d, consumed, a.contributors.rank[r], moved.rows, moved.bytes);
  }
  g.sync();
  return {};
}

// The rank that reads the contributions of a node's ranks.
MOE_HD inline int reader_of(const ReduceArgs& a, int node) {
  return node == a.d.node_of(a.root) ? a.root : a.d.gateway(node, a.root);
}

template <Group G, Fabric<G> F>
MOE_HD void reduce_release(G g, F f, const ReduceArgs& a, int channel = 0) {
  const DomainView& d = a.d;
  if (reader_of(a, d.geometry.node()) != d.geometry.rank) return;
  const auto [first, last] = detail::node_contributors(a, d.geometry.node());
  if (g.lane() != 0) return;
  for (int32_t r = first; r < last; ++r)
    if (a.contributors.rank[r] != d.geometry.rank)
      f.signal_node(d.local_of(a.contributors.rank[r]),
                    d.of_channel(d.at.released, d.geometry.local(), channel), 1);
}

template <Group G, Fabric<G> F>
MOE_HD Status reduce_finish(G g, F f, const ReduceArgs& a, int channel = 0) {
  const DomainView& d = a.d;
  const int reader = reader_of(a, d.geometry.node());
  if (reader == d.geometry.rank || !a.contributors.contains(d.geometry.rank)) return {};
  return leader(g, [&] {
    const int local = d.local_of(reader);
    return f.wait_node(d.of_channel(d.at.released, local, channel), ++a.consumed[channel].released[local],
                       Phase::done, reader);
  });
}

}  // namespace moecomm
