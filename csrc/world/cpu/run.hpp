// One rank's calls as a sequence of roles. On the CPU a rank is one lane: roles run one after another,
// in an order in which nobody waits for something that comes later on another rank. Puts are
// asynchronous and waits keep the network moving, so the hops still overlap.
#pragma once
#include <chrono>

#include "protocol/combine.hpp"
#include "protocol/dispatch.hpp"
#include "protocol/plan.hpp"

namespace moecomm {

// One role of a call; where the fabric keeps a timeline, the role's span goes there.
template <Group G, class F, class Work>
auto timed(G g, F f, Phase role, Work work) {
  if constexpr (requires { f.timeline(); }) {
    if (g.lane() == 0 && f.timeline() != nullptr) {
      struct Clock {
        static int64_t now() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }
        decltype(f.timeline()) timeline;
        Phase role;
        int64_t begin = now();
        ~Clock() { timeline->push_back({role, begin, now()}); }
      } clock{f.timeline(), role};
      return work();
    }
  }
  return work();
}

template <Group G, class F>
Status run_dispatch(G g, F f, const DispatchArgs& a, Offer offer) {
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  MOE_TRY(timed(g, f, Phase::none, [&] {
    if (a.cached) return Status{};
    MOE_TRY(sort_picks(g, a, 0, a.plan.tokens));
    count_picks(g, a);
    return Status{};
  }));
  MOE_TRY(timed(g, f, Phase::announce, [&] {
    announce(g, f, a);
    return relay(g, f, a, offer);
  }));
  for (int c = 0; c < channels; ++c) timed(g, f, Phase::send, [&] { send(g, f, a, c); });
  MOE_TRY(timed(g, f, Phase::counts, [&] {
    MOE_TRY(place(g, f, a));
    judge(g, f, a);
    return Status{};
  }));
  // A node sends to the one behind it first, so its predecessor's rows are the first to come.
  for (int step = 0; step < nodes; ++step)
    for (int c = 0; c < channels; ++c)
      MOE_TRY(timed(g, f, Phase::forward, [&] { return forward(g, f, a, (own + nodes - step) % nodes, c); }));
  return timed(g, f, Phase::arrive, [&] {
    MOE_TRY(announce_arrival(g, f, a));
    return arrive(g, f, a, 0, 1);
  });
}

template <Group G, class F>
Status run_combine(G g, F f, const CombineArgs& a) {
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  MOE_TRY(timed(g, f, Phase::publish, [&] { return publish(g, f, a); }));
  for (int step = 1; step < nodes; ++step)
    for (int c = 0; c < channels; ++c)
      MOE_TRY(timed(g, f, Phase::reduce, [&] { return reduce(g, f, a, (own + step) % nodes, c); }));
  for (int c = 0; c < channels; ++c) MOE_TRY(timed(g, f, Phase::sum, [&] { return sum(g, f, a, c); }));
  return timed(g, f, Phase::done, [&] { return finish(g, f, a); });
}

}  // namespace moecomm
