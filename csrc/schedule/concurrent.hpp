// The schedule of one rank's call on many concurrent groups: which group executes which role, and which
// groups wait for each other inside the rank. It is independent of the world, like the protocol, so that
// threads on a CPU can run it under ThreadSanitizer.
//
// Groups   Groups 0 .. workers-1 are workers, which move rows. Group `workers` is the coordinator, which
//          communicates with other ranks about the call as a whole (announce, relay, place, judge; publish,
//          finish). Channel c belongs to worker c mod senders.
// Latches  A latch counts the groups that have reached a point of the call. Latches order the groups of one
//          rank:
//
//   workers      number_from_zero -> [numbered] -> sum_channels -> [totals] -> shift_channel -> [shifted]
//   coordinator  [totals] announce, relay [shifted] -> [entered] -> place -> [placed] -> judge
//   senders      [entered] send, then [placed] forward of the rows of this rank's node
//   forwarders   [placed] forward of other nodes' rows as they land
//   all          -> [forwarded]; coordinator announce_arrival; then all groups: arrive
//
//   coordinator  publish -> [published];  workers: reduce, sum -> [reduced];  coordinator finish
//
// A worker that finds an invalid pick arrives at [refused] before it arrives at [numbered]. The rank then
// refuses its part and continues as a rank without tokens.
//
// The latches add no deadlock: the order above is the order of roles in the cpu world
// (schedule/sequential.hpp), with independent roles side by side. Ranks wait for each other only in the
// protocol's own waits.
#pragma once
#include "protocol/combine.hpp"
#include "protocol/dispatch.hpp"
#include "protocol/plan.hpp"

namespace moecomm {

enum class Latch : int {
  numbered,
  totals,
  shifted,
  entered,
  placed,
  forwarded,
  published,
  reduced,
  refused,
  count
};

// The latches of one call; they are 0 when it begins. All lanes of a group call these functions.
//   arrive(g, latch)        counts the group; its earlier writes are visible to groups that wait for the
//   latch wait(g, latch, groups)  waits until `groups` groups have arrived; Status of a failed or late rank
//   open(g, latch)          whether any group has arrived. Only for a latch at which groups arrive before
//                           they arrive at a latch that the caller has waited for
//   note(g, bad)            records an invalid argument of this rank, before its peers are told
template <class Latches, class G>
concept CallLatches = requires(Latches latches, G g, Latch latch) {
  latches.arrive(g, latch);
  { latches.wait(g, latch, 0) } -> std::same_as<Status>;
  { latches.open(g, latch) } -> std::same_as<bool>;
  latches.note(g, Status{});
};

// Of a group among those of its rank.
struct GroupIndex {
  int index = 0;
  int workers = 1;
  int senders = 1;  // the first workers; the rest forward other nodes' rows. One node: all workers

  MOE_HD bool coordinates() const { return index == workers; }
};

struct DispatchWork {
  DispatchArgs args;
  Offer offer;
  int32_t* channel_counts;  // scratch [C, N, ints]
};

namespace detail {

MOE_HD inline bool makes_plan(const DispatchArgs& a) { return !a.cached && a.refused == Why::none; }

template <Group G, Fabric<G> F, CallLatches<G> Latches, class Placed>
MOE_HD Status coordinate_dispatch(G g, F f, Latches latches, const DispatchWork& w, GroupIndex self,
                                  Placed placed) {
  const DispatchArgs& a = w.args;
  const bool plans = makes_plan(a);
  if (plans) MOE_TRY(latches.wait(g, Latch::totals, self.workers));
  announce(g, f, a, plans && latches.open(g, Latch::refused) ? Why::picks : a.refused);
  MOE_TRY(relay(g, f, a, w.offer));
  if (plans) MOE_TRY(latches.wait(g, Latch::shifted, self.workers));
  latches.arrive(g, Latch::entered);
  MOE_TRY(place(g, f, a));
  placed();
  latches.arrive(g, Latch::placed);
  judge(g, f, a);
  MOE_TRY(latches.wait(g, Latch::forwarded, self.workers));
  return announce_arrival(g, f, a);
}

// `bad` out: an invalid pick that this worker found.
template <Group G, CallLatches<G> Latches>
MOE_HD Status make_plan(G g, Latches latches, const DispatchWork& w, GroupIndex self, Status& bad) {
  const DispatchArgs& a = w.args;
  const int channels = a.b.shape.channels;
  for (int c = self.index; c < channels && bad.ok(); c += self.workers) {
    bad = sort_picks(g, a, channel_begin(a.plan.tokens, c, channels),
                     channel_begin(a.plan.tokens, c + 1, channels));
    g.sync();
    if (bad.ok()) number_from_zero(g, a, c, w.channel_counts);
  }
  if (!bad.ok()) {
    latches.note(g, bad);
    latches.arrive(g, Latch::refused);
  }
  latches.arrive(g, Latch::numbered);
  MOE_TRY(latches.wait(g, Latch::numbered, self.workers));
  const bool refused = latches.open(g, Latch::refused);
  if (!refused) sum_channels(g, a, w.channel_counts, self.index, self.workers);
  latches.arrive(g, Latch::totals);
  MOE_TRY(latches.wait(g, Latch::totals, self.workers));
  for (int c = self.index; c < channels && !refused; c += self.workers)
    shift_channel(g, a, c, w.channel_counts);
  latches.arrive(g, Latch::shifted);
  return {};
}

}  // namespace detail

// All lanes of the coordinator call `placed` when the number of this rank's rows is known.
template <Group G, Fabric<G> F, CallLatches<G> Latches, class Placed>
MOE_HD Status dispatch_group(G g, F f, Latches latches, const DispatchWork& w, GroupIndex self,
                             Placed placed) {
  const DispatchArgs& a = w.args;
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  const bool plans = detail::makes_plan(a);
  Status bad;
  if (self.coordinates()) {
    MOE_TRY(detail::coordinate_dispatch(g, f, latches, w, self, placed));
  } else {
    if (plans) MOE_TRY(detail::make_plan(g, latches, w, self, bad));
    if (self.index < self.senders) {
      MOE_TRY(latches.wait(g, Latch::entered, 1));
      const bool sends = a.refused == Why::none && !(plans && latches.open(g, Latch::refused));
      for (int c = self.index; c < channels && sends; c += self.senders) send(g, f, a, c);
      MOE_TRY(latches.wait(g, Latch::placed, 1));
      for (int c = self.index; c < channels; c += self.senders) MOE_TRY(forward(g, f, a, own, c));
    }
    const int forwarders = self.workers > self.senders ? self.workers - self.senders : self.workers;
    const int first = self.workers > self.senders ? self.index - self.senders : self.index;
    if (first >= 0 && nodes > 1) {
      MOE_TRY(latches.wait(g, Latch::placed, 1));
      for (int i = first; i < (nodes - 1) * channels; i += forwarders)
        MOE_TRY(forward(g, f, a, (own + nodes - 1 - i / channels) % nodes,
                        i % channels));  // starts with the node that sends to this one first
    }
    latches.arrive(g, Latch::forwarded);
  }
  const Status s = arrive(g, f, a, self.index, self.workers + 1);
  if (!plans || s.ok() || is_final(s) || !latches.open(g, Latch::refused)) return s;
  return bad;  // more precise than the call's status, which only says that this rank refused
}

template <Group G, Fabric<G> F, CallLatches<G> Latches>
MOE_HD Status combine_group(G g, F f, Latches latches, const CombineArgs& a, GroupIndex self) {
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  if (self.coordinates()) {
    MOE_TRY(publish(g, f, a));
    latches.arrive(g, Latch::published);
    MOE_TRY(latches.wait(g, Latch::reduced, self.workers));
    return finish(g, f, a);
  }
  MOE_TRY(latches.wait(g, Latch::published, 1));
  for (int i = self.index; i < (nodes - 1) * channels; i += self.workers)
    MOE_TRY(reduce(g, f, a, (own + 1 + i / channels) % nodes, i % channels));
  for (int c = self.index; c < channels; c += self.workers) MOE_TRY(sum(g, f, a, c));
  latches.arrive(g, Latch::reduced);
  return {};
}

}  // namespace moecomm
