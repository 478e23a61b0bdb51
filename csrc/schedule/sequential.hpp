// One rank's calls as a sequence of roles. On the CPU a rank is one lane: roles run one after another,
// in an order in which nobody waits for something that comes later on another rank. Puts are
// asynchronous and waits keep the network moving, so the hops still overlap.
#pragma once
#include "protocol/combine.hpp"
#include "protocol/dispatch.hpp"
#include "protocol/plan.hpp"
#include "schedule/timed.hpp"

namespace moecomm {

namespace detail {

template <Group G, Fabric<G> F>
Status plan_rows(G g, F f, const DispatchArgs& a) {
  return timed(g, f, RoleKind::plan, [&] {
    MOE_TRY(sort_picks(g, a, 0, a.plan.tokens));
    count_picks(g, a);
    return Status{};
  });
}

// From the exchange of counts on. tables: what is still to do before they can be read.
template <Group G, Fabric<G> F, class Tables>
Status move_rows(G g, F f, const DispatchArgs& a, bool sends, Tables tables) {
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  for (int c = 0; c < channels && sends; ++c) timed(g, f, RoleKind::send, [&] { send(g, f, a, c); });
  MOE_TRY(timed(g, f, RoleKind::counts, [&] {
    MOE_TRY(tables());
    MOE_TRY(place(g, f, a));
    judge(g, f, a);
    return Status{};
  }));
  // A node sends to the one behind it first, so its predecessor's rows are the first to come.
  for (int step = 0; step < nodes; ++step)
    for (int c = 0; c < channels; ++c)
      MOE_TRY(
          timed(g, f, RoleKind::forward, [&] { return forward(g, f, a, (own + nodes - step) % nodes, c); }));
  return timed(g, f, RoleKind::arrive, [&] {
    MOE_TRY(announce_arrival(g, f, a));
    return arrive(g, f, a, 0, 1);
  });
}

}  // namespace detail

// A rank with bad picks refuses its part.
template <Group G, Fabric<G> F>
Status run_dispatch(G g, F f, const DispatchArgs& a, Offer offer) {
  Status bad;
  if (!a.cached && a.refused == Why::none) bad = detail::plan_rows(g, f, a);
  const Why refused = bad.ok() ? a.refused : Why::picks;
  MOE_TRY(timed(g, f, RoleKind::announce, [&] {
    announce(g, f, a, refused);
    return relay(g, f, a, offer);
  }));
  const Status s = detail::move_rows(g, f, a, refused == Why::none, [] { return Status{}; });
  return bad.ok() || is_final(s) ? s : bad;
}

// One exchange of a.asked and nothing else; picks(source) is good within use(picks), and until another
// exchange.
template <Group G, Fabric<G> F, class Use>
Status run_exchange(G g, F f, DispatchArgs a, Use use) {
  a.alone = true;
  announce(g, f, a, a.refused, false);
  MOE_TRY(relay(g, f, a, {}));
  MOE_TRY(await_counts(g, f, a));
  char* window = f.window(a.b.geometry.local());
  if (const Verdict v = detail::agreement(a, window); v.code != 0) return status_of(v);
  use([&](int source) { return picks_of(a, window, source); });
  return {};
}

// A dispatch by picks of logical experts, whose slots depend on everyone's: a.asked carries this rank's. The
// chooser writes the slots to a.ids64 when it gets the picks of all: choose(picks of source), rows_follow,
// rows_to(source, counts). move(args, sends, tables) does what follows, as detail::move_rows.
template <Group G, Fabric<G> F, class Chooser, class Move>
Status run_dispatch(G g, F f, DispatchArgs a, Offer offer, Chooser&& chooser, Move move) {
  MOE_TRY(timed(g, f, RoleKind::announce, [&] {
    announce(g, f, a, Why::none);
    return relay(g, f, a, offer);
  }));
  MOE_TRY(timed(g, f, RoleKind::counts, [&] { return await_counts(g, f, a); }));
  char* window = f.window(a.b.geometry.local());
  // Where ranks called differently all know it now, and those that have not chosen send nothing.
  const bool agreed = detail::agreement(a, window).code == 0;
  if (agreed) {
    MOE_TRY(leader(g, [&] {
      return timed(g, f, RoleKind::plan, [&] {
        chooser.choose([&](int source) { return picks_of(a, window, source); });
        return Status{};
      });
    }));
    MOE_TRY(detail::plan_rows(g, f, a));
    a.asked = nullptr;
    MOE_TRY(timed(g, f, RoleKind::announce, [&] {
      announce(g, f, a, Why::none, false);
      return chooser.rows_follow ? Status{} : relay(g, f, a, offer);
    }));
  }
  return move(a, agreed, [&] {
    return agreed && chooser.rows_follow
               ? derive_tables(g, f, a, [&](int source, int32_t* counts) { chooser.rows_to(source, counts); })
               : Status{};
  });
}

template <Group G, Fabric<G> F, class Chooser>
Status run_dispatch(G g, F f, const DispatchArgs& a, Offer offer, Chooser&& chooser) {
  return run_dispatch(g, f, a, offer, chooser, [&](const DispatchArgs& chosen, bool sends, auto tables) {
    return detail::move_rows(g, f, chosen, sends, tables);
  });
}

template <Group G, Fabric<G> F>
Status run_combine(G g, F f, const CombineArgs& a) {
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  MOE_TRY(timed(g, f, RoleKind::publish, [&] { return publish(g, f, a); }));
  for (int step = 1; step < nodes; ++step)
    for (int c = 0; c < channels; ++c)
      MOE_TRY(timed(g, f, RoleKind::reduce, [&] { return reduce(g, f, a, (own + step) % nodes, c); }));
  for (int c = 0; c < channels; ++c) MOE_TRY(timed(g, f, RoleKind::sum, [&] { return sum(g, f, a, c); }));
  return timed(g, f, RoleKind::done, [&] { return finish(g, f, a); });
}

}  // namespace moecomm
