// One rank's calls in the sim world. Every role is a fiber, and all channels run concurrently, like the warps
// of a GPU. The order that roles leave open is open here too, so that exploration includes schedules that
// otherwise occur only on a GPU.
#pragma once
#include "exec/lane.hpp"
#include "protocol/combine.hpp"
#include "protocol/dispatch.hpp"
#include "protocol/plan.hpp"
#include "runtime/sim/role_fibers.hpp"
#include "schedule/sequential.hpp"

namespace moecomm {

// Runs a part of a call on the rank's main fiber, with a name for the log. Roles have the same names as in
// the cpu world's timeline.
template <class Part>
auto sim_part(SimNet& net, const char* name, Part part) {
  Role& r = net.role();
  const char* caller = r.name;
  const Time begin = net.fibers().now();
  r.name = name;
  const auto result = part();
  net.log({begin, net.fibers().now(), LogKind::role, Phase::none, r.rank, r.channel, -1, name, 0, 0});
  r.name = caller;
  return result;
}

// The order of roles of the cpu world, on the virtual clock.
template <Fabric<Lane> F>
Status lane_dispatch(SimNet& net, F f, const DispatchArgs& a, Offer offer) {
  net.spend(net.hardware().launch);
  if (!a.cached) net.spend(net.hardware().plan_token * a.plan.tokens);
  return run_dispatch(Lane{}, f, a, offer);
}

template <Fabric<Lane> F, class Chooser>
Status lane_dispatch(SimNet& net, F f, const DispatchArgs& a, Offer offer, Chooser& chooser) {
  net.spend(net.hardware().launch + net.hardware().plan_token * a.plan.tokens);
  return run_dispatch(Lane{}, f, a, offer, chooser);
}

template <Fabric<Lane> F>
Status lane_combine(SimNet& net, F f, const CombineArgs& a) {
  net.spend(net.hardware().launch);
  return run_combine(Lane{}, f, a);
}

namespace detail {

// Like move_rows of the cpu world.
template <Fabric<Lane> F, class Tables>
Status sim_move_rows(SimNet& net, F f, const DispatchArgs& a, bool sends, Tables tables) {
  constexpr Lane g;
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  RoleFibers roles(net, a.b.geometry.rank);
  std::vector<int> sent(channels);
  for (int c = 0; c < channels && sends; ++c)
    sent[c] = roles.start("send", c, [&, c] {
      send(g, f, a, c);
      return Status{};
    });
  const Status placed = sim_part(net, "counts", [&] {
    MOE_TRY(tables());
    MOE_TRY(place(g, f, a));
    judge(g, f, a);
    return Status{};
  });
  if (placed.ok()) {
    for (int c = 0; c < channels; ++c)
      roles.start("forward", c, [&, c] {
        // A node first sends to the next node, so the rows of the previous node are the first to arrive.
        for (int step = 1; step < nodes; ++step) MOE_TRY(forward(g, f, a, (own + nodes - step) % nodes, c));
        if (sends) roles.wait_for(sent[c]);  // it wrote the metadata of this rank's node
        return forward(g, f, a, own, c);
      });
  }
  const Status forwarded = roles.join();
  MOE_TRY(placed);
  MOE_TRY(forwarded);
  return sim_part(net, "arrive", [&] {
    MOE_TRY(announce_arrival(g, f, a));
    return arrive(g, f, a, 0, 1);
  });
}

}  // namespace detail

template <Fabric<Lane> F>
Status sim_dispatch(SimNet& net, F f, const DispatchArgs& a, Offer offer) {
  constexpr Lane g;
  net.spend(net.hardware().launch);
  Status bad;
  if (!a.cached && a.refused == Why::none) {
    bad = sim_part(net, "plan", [&] {
      net.spend(net.hardware().plan_token * a.plan.tokens);
      MOE_TRY(sort_picks(g, a, 0, a.plan.tokens));
      count_picks(g, a);
      return Status{};
    });
  }
  const Why refused = bad.ok() ? a.refused : Why::picks;
  MOE_TRY(sim_part(net, "announce", [&] {
    announce(g, f, a, refused);
    return relay(g, f, a, offer);
  }));
  const Status s = detail::sim_move_rows(net, f, a, refused == Why::none, [] { return Status{}; });
  return bad.ok() || is_final(s) ? s : bad;
}

template <Fabric<Lane> F, class Chooser>
Status sim_dispatch(SimNet& net, F f, const DispatchArgs& a, Offer offer, Chooser& chooser) {
  net.spend(net.hardware().launch + net.hardware().plan_token * a.plan.tokens);
  return run_dispatch(Lane{}, f, a, offer, chooser, [&](const DispatchArgs& chosen, bool sends, auto tables) {
    return detail::sim_move_rows(net, f, chosen, sends, tables);
  });
}

template <Fabric<Lane> F>
Status sim_combine(SimNet& net, F f, const CombineArgs& a) {
  constexpr Lane g;
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  net.spend(net.hardware().launch);
  MOE_TRY(sim_part(net, "publish", [&] { return publish(g, f, a); }));
  RoleFibers roles(net, a.b.geometry.rank);
  for (int c = 0; c < channels; ++c) {
    if (nodes > 1)
      roles.start("reduce", c, [&, c] {
        for (int step = 1; step < nodes; ++step) MOE_TRY(reduce(g, f, a, (own + step) % nodes, c));
        return Status{};
      });
    roles.start("sum", c, [&, c] { return sum(g, f, a, c); });
  }
  MOE_TRY(roles.join());
  return sim_part(net, "done", [&] { return finish(g, f, a); });
}

}  // namespace moecomm
