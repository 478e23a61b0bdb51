// multicast: sends the same segments to many ranks. They cross the network to each node once. The receiver
// there copies them to the other receivers of its node, so no link carries them twice.
//
//   multicast_send      [root]       sends to one receiver of every other node, then to those of its own node
//   multicast_forward   [receivers]  the one that the root sends to copies each run to the others of its node
//   multicast_arrive    [receivers]  waits until all segments have arrived
//
// In each other node the root sends to its gateway if that is a receiver, else to the first receiver.
// Segments are written directly to their final places. In a call with several multicasts, all sends come
// first, then all forwards in the order of the list, then all arrivals. Sends never wait, so no two ranks
// wait for each other. Every channel of a call does this with its own runs, concurrently with the other
// channels.
#pragma once
#include "protocol/verbs.hpp"

namespace moecomm {

namespace detail {

// The receiver of a node that the root sends to. Receivers [first, end) are those of the node.
MOE_HD inline int fed_rank(const MulticastArgs& a, int32_t first, int32_t end) {
  const int gateway = a.d.gateway(a.d.node_of(a.receivers.rank[first]), a.root);
  for (int32_t i = first; i < end; ++i)
    if (a.receivers.rank[i] == gateway) return gateway;
  return a.receivers.rank[first];
}

// The receivers of a node: [first, end) of the list; empty if there are none.
struct NodeReceivers {
  int32_t first = 0, end = 0;
};
MOE_HD inline NodeReceivers node_receivers(const MulticastArgs& a, int node) {
  NodeReceivers r;
  const int p = a.d.geometry.ranks_per_node;
  while (r.first < a.receivers.count && a.receivers.rank[r.first] / p < node) ++r.first;
  r.end = r.first;
  while (r.end < a.receivers.count && a.receivers.rank[r.end] / p == node) ++r.end;
  return r;
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD void multicast_send(G g, F f, const MulticastArgs& a, int channel = 0) {
  const DomainView& d = a.d;
  if (d.geometry.rank != a.root) return;
  const int p = d.geometry.ranks_per_node;
  const CounterAt landed = d.of_channel(d.at.landed, a.root, channel);
  const auto [first, last] = detail::node_receivers(a, d.geometry.node());
  detail::Moved moved;
  detail::each_run(d, a.segments, channel, [&](int64_t i, int64_t end) -> Status {
    // Over the rail first: the gateways forward it while this rank writes to its own node.
    for (int32_t r = 0, next; r < a.receivers.count; r = next) {
      next = a.receivers.end_of_node(r, p);
      if (d.same_node(a.receivers.rank[r])) continue;
      const int to = detail::fed_rank(a, r, next);
      detail::copy_out(g, f, d, to, a.segments, i, end);
      g.sync();
      if (g.lane() == 0) detail::signal(f, d, to, landed, 1);
    }
    for (int32_t r = first; r < last; ++r) {
      const int to = a.receivers.rank[r];
      detail::copy_out(g, f, d, to, a.segments, i, end);
      g.sync();
      if (g.lane() == 0 && to != a.root) detail::signal(f, d, to, landed, 1);
    }
    moved.add(a.segments, i, end);
    return {};
  });
  if (g.lane() == 0)
    for (int32_t r = 0, next; r < a.receivers.count; r = next) {
      next = a.receivers.end_of_node(r, p);
      const int fed = d.same_node(a.receivers.rank[r]) ? -1 : detail::fed_rank(a, r, next);
      for (int32_t i = r; i < next; ++i)
        detail::count_hop(f, d, a.consumed + channel, a.receivers.rank[i], moved.rows, moved.bytes,
                          fed < 0 || a.receivers.rank[i] == fed);
    }
  g.sync();
}

template <Group G, Fabric<G> F>
MOE_HD Status multicast_forward(G g, F f, const MulticastArgs& a, int channel = 0) {
  const DomainView& d = a.d;
  const int me = d.geometry.rank;
  if (d.same_node(a.root)) return {};
  const auto [first, last] = detail::node_receivers(a, d.geometry.node());
  if (first == last || detail::fed_rank(a, first, last) != me) return {};
  const char* own = f.window(d.geometry.local());
  DomainConsumed* consumed = a.consumed + channel;
  const CounterAt landed = d.of_channel(d.at.landed, a.root, channel),
                  next = d.of_channel(d.at.landed, me, channel);
  uint64_t seen = consumed->landed[a.root];
  detail::Moved moved;
  g.sync();
  MOE_TRY(detail::each_run(d, a.segments, channel, [&](int64_t i, int64_t end) -> Status {
    ++seen;
    MOE_TRY(leader(g, [&] { return detail::await_counter(f, d, a.root, landed, seen, Phase::forward); }));
    for (int32_t r = first; r < last; ++r) {
      const int to = a.receivers.rank[r];
      if (to == me) continue;
      char* window = f.window(d.local_of(to));
      for (int64_t k = i; k < end; ++k)
        f.copy_row(g, window + a.segments.segment[k].there, own + a.segments.segment[k].there,
                   a.segments.segment[k].bytes);
      g.sync();
      if (g.lane() == 0) f.signal_node(d.local_of(to), next, 1);
    }
    moved.add(a.segments, i, end);
    return {};
  }));
  if (g.lane() == 0) {
    consumed->landed[a.root] = seen;
    for (int32_t r = first; r < last; ++r)
      detail::count_hop(f, d, consumed, a.receivers.rank[r], moved.rows, moved.bytes);
  }
  g.sync();
  return {};
}

template <Group G, Fabric<G> F>
MOE_HD Status multicast_arrive(G g, F f, const MulticastArgs& a, int channel = 0) {
  const DomainView& d = a.d;
  const int me = d.geometry.rank;
  if (me == a.root || !a.receivers.contains(me)) return {};
  int from = a.root;
  if (!d.same_node(a.root)) {
    const auto [first, last] = detail::node_receivers(a, d.geometry.node());
    from = detail::fed_rank(a, first, last);
    if (from == me) return {};  // this rank waited while it forwarded
  }
  return leader(g, [&] {
    uint64_t& seen = a.consumed[channel].landed[from];
    detail::each_run(d, a.segments, channel, [&](int64_t, int64_t) -> Status {
      ++seen;
      return {};
    });
    return detail::await_counter(f, d, from, d.of_channel(d.at.landed, from, channel), seen, Phase::arrive);
  });
}

}  // namespace moecomm
