// The schedule of one rank's call as a sequence of roles. On the CPU a rank is one lane, and its roles run
// one after another. The order is such that no rank waits for something that another rank does only later.
// Puts are asynchronous, and waits make progress on the network, so the hops still overlap.
#pragma once
#include <concepts>

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

// The roles after the exchange of counts. tables() completes the count tables before they are read. placed()
// is called when every row has its place, before this rank waits for rows, unless the call is refused.
template <Group G, Fabric<G> F, class Tables, class Placed>
Status move_rows(G g, F f, const DispatchArgs& a, bool sends, Tables tables, Placed placed) {
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  for (int c = 0; c < channels && sends; ++c) timed(g, f, RoleKind::send, [&] { send(g, f, a, c); });
  MOE_TRY(timed(g, f, RoleKind::counts, [&] {
    MOE_TRY(tables());
    MOE_TRY(place(g, f, a));
    judge(g, f, a);
    return Status{};
  }));
  if (a.verdict->ok()) placed();
  // A node first sends to the next node, so the rows of the previous node are the first to arrive.
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

// For calls whose counts are not needed before the rows have arrived.
struct CountsNotAsked {
  void operator()() const {}
};

// A rank with bad picks refuses its part. placed: as in detail::move_rows.
template <Group G, Fabric<G> F, std::invocable Placed = CountsNotAsked>
Status run_dispatch(G g, F f, const DispatchArgs& a, Offer offer, Placed placed = {}) {
  Status bad;
  if (!a.cached && a.refused == Why::none) bad = detail::plan_rows(g, f, a);
  const Why refused = bad.ok() ? a.refused : Why::picks;
  MOE_TRY(timed(g, f, RoleKind::announce, [&] {
    announce(g, f, a, refused);
    return relay(g, f, a, offer);
  }));
  const Status s = detail::move_rows(g, f, a, refused == Why::none, [] { return Status{}; }, placed);
  return bad.ok() || is_final(s) ? s : bad;
}

// One exchange of a.logical_blocks and nothing else. The counts that picks(source) returns are valid until
// use(picks) returns.
template <Group G, Fabric<G> F, class Use>
Status run_exchange(G g, F f, DispatchArgs a, Use use) {
  a.alone = true;
  announce(g, f, a, a.refused, false);
  MOE_TRY(relay(g, f, a, {}));
  MOE_TRY(await_counts(g, f, a));
  char* window = f.window(a.b.geometry.local());
  if (const Verdict v = detail::agreement(a, window); !v.ok()) return status_of(v);
  use([&](int source) { return picks_of(a, window, source); });
  return {};
}

// A dispatch by picks of logical experts, whose expert slots depend on the picks of all ranks.
// a.logical_blocks has this rank's counts. The chooser has choose(picks of source), which writes the expert
// slots to a.ids64 once the counts of all ranks are known, rows_follow, and rows_to(source, counts).
// move(args, sends, tables) does the rest, like detail::move_rows.
template <Group G, Fabric<G> F, class Chooser, class Move>
  requires(!std::invocable<Move>)
Status run_dispatch(G g, F f, DispatchArgs a, Offer offer, Chooser&& chooser, Move move) {
  MOE_TRY(timed(g, f, RoleKind::announce, [&] {
    announce(g, f, a, Why::none);
    return relay(g, f, a, offer);
  }));
  MOE_TRY(timed(g, f, RoleKind::counts, [&] { return await_counts(g, f, a); }));
  char* window = f.window(a.b.geometry.local());
  // If the calls differ, all ranks know it now. They make no choice and send nothing.
  const bool agreed = detail::agreement(a, window).ok();
  if (agreed) {
    MOE_TRY(leader(g, [&] {
      return timed(g, f, RoleKind::plan, [&] {
        chooser.choose([&](int source) { return picks_of(a, window, source); });
        return Status{};
      });
    }));
    MOE_TRY(detail::plan_rows(g, f, a));
    a.logical_blocks = nullptr;
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

template <Group G, Fabric<G> F, class Chooser, std::invocable Placed = CountsNotAsked>
  requires(!std::invocable<Chooser>)
Status run_dispatch(G g, F f, const DispatchArgs& a, Offer offer, Chooser&& chooser, Placed placed = {}) {
  return run_dispatch(g, f, a, offer, chooser, [&](const DispatchArgs& chosen, bool sends, auto tables) {
    return detail::move_rows(g, f, chosen, sends, tables, placed);
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
