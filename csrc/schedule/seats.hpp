// The schedule of one rank's call on many concurrent groups: which group executes which role, and which
// groups wait for each other inside the rank. It is independent of the world, like the protocol, so that
// threads on a CPU can run it under ThreadSanitizer.
//
// Seats  A group's seat says what it does. Seats 0 .. workers-1 are workers, which move rows. Seat `workers`
//        is the coordinator, which communicates with other ranks about the call as a whole (announce, relay,
//        place, judge; publish, finish). Channel c belongs to worker c mod senders.
// Gates  A gate counts the groups that have reached a point of the call. Gates order the seats of one rank:
//
//   workers      number_apart -> [numbered] -> sum_channels -> [totals] -> shift_channel -> [shifted]
//   coordinator  [totals] announce, relay [shifted] -> [entered] -> place -> [placed] -> judge
//   senders      [entered] send, then [placed] forward of the rows of this rank's node
//   forwarders   [placed] forward of other nodes' rows as they land
//   all          -> [forwarded]; coordinator announce_arrival; then all seats: arrive
//
//   coordinator  publish -> [published];  workers: reduce, sum -> [reduced];  coordinator finish
//
// A worker that finds an invalid pick arrives at [refused] before it arrives at [numbered]. The rank then
// refuses its part and continues as a rank without tokens.
//
// The gates add no deadlock: the order above is the order of roles in the cpu world
// (schedule/sequential.hpp), with independent roles side by side. Ranks wait for each other only in the
// protocol's own waits.
#pragma once
#include "protocol/combine.hpp"
#include "protocol/dispatch.hpp"
#include "protocol/plan.hpp"

namespace moecomm {

enum class Gate : int {
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

// The gates of one call; they are 0 when it begins. All lanes of a group call these functions.
//   arrive(g, gate)         counts the group; its earlier writes are visible to groups that wait for the gate
//   wait(g, gate, groups)   waits until `groups` groups have arrived; Status of a failed or late rank
//   open(g, gate)           whether any group has arrived. Only for a gate at which groups arrive before they
//                           arrive at a gate that the caller has waited for
//   note(g, bad)            records an invalid argument of this rank, before its peers are told
template <class Gates, class G>
concept CallGates = requires(Gates gates, G g, Gate gate) {
  gates.arrive(g, gate);
  { gates.wait(g, gate, 0) } -> std::same_as<Status>;
  { gates.open(g, gate) } -> std::same_as<bool>;
  gates.note(g, Status{});
};

struct Seat {
  int index = 0;
  int workers = 1;
  int senders = 1;  // the first workers; the rest forward other nodes' rows. One node: all workers

  MOE_HD bool coordinates() const { return index == workers; }
};

struct DispatchWork {
  DispatchArgs args;
  Offer offer;
  int32_t* apart;  // scratch [C, N, ints]
};

namespace detail {

MOE_HD inline bool makes_plan(const DispatchArgs& a) { return !a.cached && a.refused == Why::none; }

template <Group G, Fabric<G> F, CallGates<G> Gates, class Placed>
MOE_HD Status coordinate_dispatch(G g, F f, Gates gates, const DispatchWork& w, Seat seat, Placed placed) {
  const DispatchArgs& a = w.args;
  const bool plans = makes_plan(a);
  if (plans) MOE_TRY(gates.wait(g, Gate::totals, seat.workers));
  announce(g, f, a, plans && gates.open(g, Gate::refused) ? Why::picks : a.refused);
  MOE_TRY(relay(g, f, a, w.offer));
  if (plans) MOE_TRY(gates.wait(g, Gate::shifted, seat.workers));
  gates.arrive(g, Gate::entered);
  MOE_TRY(place(g, f, a));
  placed();
  gates.arrive(g, Gate::placed);
  judge(g, f, a);
  MOE_TRY(gates.wait(g, Gate::forwarded, seat.workers));
  return announce_arrival(g, f, a);
}

// `bad` out: an invalid pick that this worker found.
template <Group G, CallGates<G> Gates>
MOE_HD Status make_plan(G g, Gates gates, const DispatchWork& w, Seat seat, Status& bad) {
  const DispatchArgs& a = w.args;
  const int channels = a.b.shape.channels;
  for (int c = seat.index; c < channels && bad.ok(); c += seat.workers) {
    bad = sort_picks(g, a, channel_begin(a.plan.tokens, c, channels),
                     channel_begin(a.plan.tokens, c + 1, channels));
    g.sync();
    if (bad.ok()) number_apart(g, a, c, w.apart);
  }
  if (!bad.ok()) {
    gates.note(g, bad);
    gates.arrive(g, Gate::refused);
  }
  gates.arrive(g, Gate::numbered);
  MOE_TRY(gates.wait(g, Gate::numbered, seat.workers));
  const bool refused = gates.open(g, Gate::refused);
  if (!refused) sum_channels(g, a, w.apart, seat.index, seat.workers);
  gates.arrive(g, Gate::totals);
  MOE_TRY(gates.wait(g, Gate::totals, seat.workers));
  for (int c = seat.index; c < channels && !refused; c += seat.workers) shift_channel(g, a, c, w.apart);
  gates.arrive(g, Gate::shifted);
  return {};
}

}  // namespace detail

// All lanes of the coordinator call `placed` when the number of this rank's rows is known.
template <Group G, Fabric<G> F, CallGates<G> Gates, class Placed>
MOE_HD Status dispatch_seat(G g, F f, Gates gates, const DispatchWork& w, Seat seat, Placed placed) {
  const DispatchArgs& a = w.args;
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  const bool plans = detail::makes_plan(a);
  Status bad;
  if (seat.coordinates()) {
    MOE_TRY(detail::coordinate_dispatch(g, f, gates, w, seat, placed));
  } else {
    if (plans) MOE_TRY(detail::make_plan(g, gates, w, seat, bad));
    if (seat.index < seat.senders) {
      MOE_TRY(gates.wait(g, Gate::entered, 1));
      const bool sends = a.refused == Why::none && !(plans && gates.open(g, Gate::refused));
      for (int c = seat.index; c < channels && sends; c += seat.senders) send(g, f, a, c);
      MOE_TRY(gates.wait(g, Gate::placed, 1));
      for (int c = seat.index; c < channels; c += seat.senders) MOE_TRY(forward(g, f, a, own, c));
    }
    const int forwarders = seat.workers > seat.senders ? seat.workers - seat.senders : seat.workers;
    const int first = seat.workers > seat.senders ? seat.index - seat.senders : seat.index;
    if (first >= 0 && nodes > 1) {
      MOE_TRY(gates.wait(g, Gate::placed, 1));
      for (int i = first; i < (nodes - 1) * channels; i += forwarders)
        MOE_TRY(forward(g, f, a, (own + nodes - 1 - i / channels) % nodes,
                        i % channels));  // starts with the node that sends to this one first
    }
    gates.arrive(g, Gate::forwarded);
  }
  const Status s = arrive(g, f, a, seat.index, seat.workers + 1);
  if (!plans || s.ok() || is_final(s) || !gates.open(g, Gate::refused)) return s;
  return bad;  // more precise than the call's status, which only says that this rank refused
}

template <Group G, Fabric<G> F, CallGates<G> Gates>
MOE_HD Status combine_seat(G g, F f, Gates gates, const CombineArgs& a, Seat seat) {
  const int nodes = a.b.geometry.nodes(), own = a.b.geometry.node(), channels = a.b.shape.channels;
  if (seat.coordinates()) {
    MOE_TRY(publish(g, f, a));
    gates.arrive(g, Gate::published);
    MOE_TRY(gates.wait(g, Gate::reduced, seat.workers));
    return finish(g, f, a);
  }
  MOE_TRY(gates.wait(g, Gate::published, 1));
  for (int i = seat.index; i < (nodes - 1) * channels; i += seat.workers)
    MOE_TRY(reduce(g, f, a, (own + 1 + i / channels) % nodes, i % channels));
  for (int c = seat.index; c < channels; c += seat.workers) MOE_TRY(sum(g, f, a, c));
  gates.arrive(g, Gate::reduced);
  return {};
}

}  // namespace moecomm
