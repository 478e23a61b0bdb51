// A rank's calls with the schedule of the cuda world (schedule/seats.hpp), on the virtual clock.
#pragma once
#include <array>

#include "exec/lane.hpp"
#include "runtime/sim/crew.hpp"
#include "schedule/seats.hpp"

namespace moecomm {

// The gates of one call. The actions of a group before it arrives are ordered before the signals of groups
// that waited for the gate.
struct SimGates {
  struct State {
    Milestone reached;
    uint64_t count = 0;
    Time stores = 0;
    PutTimes puts;
  };
  SimNet* net;
  std::vector<std::unique_ptr<State>>* states;

  template <Group G>
  void arrive(G, Gate gate) const {
    State& s = *(*states)[static_cast<int>(gate)];
    net->fibers().meet();  // groups arrive in the order of time
    s.stores = std::max(s.stores, net->role().stores);
    s.puts.add(net->role().puts);
    s.reached.open(++s.count);
  }
  template <Group G>
  Status wait(G, Gate gate, int groups) const {
    State& s = *(*states)[static_cast<int>(gate)];
    if (!s.reached.wait(groups, true))
      return {Code::timeout, Phase::none, -1, static_cast<int32_t>(gate), 0, 0};
    net->role().comes_after(s.stores, s.puts);
    return {};
  }
  template <Group G>
  bool open(G, Gate gate) const {
    return (*states)[static_cast<int>(gate)]->count > 0;
  }
  template <Group G>
  void note(G, const Status&) const {}  // its seat returns it
};

// Runs run(gates, seat) on workers + 1 seats.
template <class Run>
Status run_seats(SimNet& net, int rank, int nodes, int workers, Run run) {
  std::vector<std::unique_ptr<SimGates::State>> states;
  for (int i = 0; i < static_cast<int>(Gate::count); ++i) {
    states.push_back(
        std::unique_ptr<SimGates::State>(new SimGates::State{Milestone(net), 0, 0, PutTimes(net.size())}));
  }
  const int senders = nodes == 1 ? workers : (workers + 1) / 2;
  Crew crew(net, rank);
  for (int i = 0; i <= workers; ++i)
    crew.start("seat", i, [&, i] { return run(SimGates{&net, &states}, Seat{i, workers, senders}); });
  return crew.join();
}

template <Fabric<Lane> F>
Status seats_dispatch(SimNet& net, F f, const DispatchArgs& a, Offer offer, int workers) {
  std::vector<int32_t> apart(uint64_t(a.b.shape.channels) * a.b.geometry.nodes() * a.b.count.ints);
  const DispatchWork work{a, offer, apart.data()};
  net.spend(net.hardware().launch);
  return run_seats(net, a.b.geometry.rank, a.b.geometry.nodes(), workers, [&](SimGates gates, Seat seat) {
    return dispatch_seat(Lane{}, f, gates, work, seat, [] {});
  });
}

template <Fabric<Lane> F>
Status seats_combine(SimNet& net, F f, const CombineArgs& a, int workers) {
  net.spend(net.hardware().launch);
  return run_seats(net, a.b.geometry.rank, a.b.geometry.nodes(), workers,
                   [&](SimGates gates, Seat seat) { return combine_seat(Lane{}, f, gates, a, seat); });
}

}  // namespace moecomm
