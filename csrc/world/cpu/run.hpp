// One rank's calls as a sequence of roles. On the CPU a rank is one lane: roles run one after another,
// in an order in which nobody waits for something that comes later on another rank. Puts are
// asynchronous and waits keep the network moving, so the hops still overlap.
#pragma once
#include "protocol/combine.hpp"
#include "protocol/dispatch.hpp"
#include "protocol/plan.hpp"

namespace moecomm {

template <Group G, class F>
Status run_dispatch(G g, F f, const DispatchArgs& a, Offer offer) {
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  if (!a.cached) {
    MOE_TRY(sort_picks(g, a, 0, a.plan.tokens));
    count_picks(g, a);
  }
  announce(g, f, a);
  MOE_TRY(relay(g, f, a, offer));
  for (int c = 0; c < channels; ++c) send(g, f, a, c);
  MOE_TRY(place(g, f, a));
  judge(g, f, a);
  for (int step = 0; step < nodes; ++step)
    for (int c = 0; c < channels; ++c) MOE_TRY(forward(g, f, a, (own + step) % nodes, c));
  MOE_TRY(announce_arrival(g, f, a));
  return arrive(g, f, a, 0, 1);
}

template <Group G, class F>
Status run_combine(G g, F f, const CombineArgs& a) {
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  MOE_TRY(publish(g, f, a));
  for (int step = 1; step < nodes; ++step)
    for (int c = 0; c < channels; ++c) MOE_TRY(reduce(g, f, a, (own + step) % nodes, c));
  for (int c = 0; c < channels; ++c) MOE_TRY(sum(g, f, a, c));
  return finish(g, f, a);
}

}  // namespace moecomm
