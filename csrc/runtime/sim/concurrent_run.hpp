// A rank's calls with the schedule of the cuda world (schedule/concurrent.hpp), on the virtual clock.
#pragma once
#include <array>

#include "exec/lane.hpp"
#include "runtime/sim/role_fibers.hpp"
#include "schedule/concurrent.hpp"

namespace moecomm {

// The latches of one call. The actions of a group before it arrives are ordered before the signals of groups
// that waited for the latch.
struct SimLatches {
  struct State {
    Milestone reached;
    uint64_t count = 0;
    Time stores = 0;
    PutTimes puts;
  };
  SimNet* net;
  std::vector<std::unique_ptr<State>>* states;

  template <Group G>
  void arrive(G, Latch latch) const {
    State& s = *(*states)[static_cast<int>(latch)];
    net->fibers().meet();  // groups arrive in the order of time
    s.stores = std::max(s.stores, net->role().stores);
    s.puts.add(net->role().puts);
    s.reached.open(++s.count);
  }
  template <Group G>
  Status wait(G, Latch latch, int groups) const {
    State& s = *(*states)[static_cast<int>(latch)];
    if (!s.reached.wait(groups, true))
      return {Code::timeout, Phase::none, -1, static_cast<int32_t>(latch), 0, 0};
    net->role().comes_after(s.stores, s.puts);
    return {};
  }
  template <Group G>
  bool open(G, Latch latch) const {
    return (*states)[static_cast<int>(latch)]->count > 0;
  }
  template <Group G>
  void note(G, const Status&) const {}  // its group returns it
};

// Runs run(latches, self) on workers + 1 groups.
template <class Run>
Status run_groups(SimNet& net, int rank, int nodes, int workers, Run run) {
  std::vector<std::unique_ptr<SimLatches::State>> states;
  for (int i = 0; i < static_cast<int>(Latch::count); ++i) {
    states.push_back(std::unique_ptr<SimLatches::State>(
        new SimLatches::State{Milestone(net), 0, 0, PutTimes(net.size())}));
  }
  const int senders = nodes == 1 ? workers : (workers + 1) / 2;
  RoleFibers roles(net, rank);
  for (int i = 0; i <= workers; ++i)
    roles.start("group", i,
                [&, i] { return run(SimLatches{&net, &states}, GroupIndex{i, workers, senders}); });
  return roles.join();
}

template <Fabric<Lane> F>
Status concurrent_dispatch(SimNet& net, F f, const DispatchArgs& a, Offer offer, int workers) {
  std::vector<int32_t> channel_counts(uint64_t(a.b.shape.channels) * a.b.geometry.nodes() * a.b.count.ints);
  const DispatchWork work{a, offer, channel_counts.data()};
  net.spend(net.hardware().launch);
  return run_groups(net, a.b.geometry.rank, a.b.geometry.nodes(), workers,
                    [&](SimLatches latches, GroupIndex self) {
                      return dispatch_group(Lane{}, f, latches, work, self, [] {});
                    });
}

template <Fabric<Lane> F>
Status concurrent_combine(SimNet& net, F f, const CombineArgs& a, int workers) {
  net.spend(net.hardware().launch);
  return run_groups(
      net, a.b.geometry.rank, a.b.geometry.nodes(), workers,
      [&](SimLatches latches, GroupIndex self) { return combine_group(Lane{}, f, latches, a, self); });
}

}  // namespace moecomm
