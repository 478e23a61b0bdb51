// A rank with the schedule of the cuda world: several concurrent groups, ordered by latches. Each group is a
// Lane or a Team with its own lists and counters. The latches are atomics, so ThreadSanitizer knows the order
// that they establish.
#pragma once
#include <array>

#include "schedule/concurrent.hpp"
#include "world.hpp"

namespace world {

// Copies to odd local ranks cross a link, so `arrive` replicates rows there. Elsewhere the gateways do.
struct GroupFabric : HostFabric<LoopbackRail> {
  static constexpr bool replicates(int local) { return local % 2 == 0; }
};

struct HostLatches {
  std::array<std::atomic<int>, static_cast<int>(Latch::count)>* counts;
  std::chrono::steady_clock::time_point deadline;

  template <class G>
  void arrive(G g, Latch latch) const {
    g.sync();
    if (g.lane() == 0) (*counts)[static_cast<int>(latch)].fetch_add(1, std::memory_order_release);
    g.sync();
  }
  template <class G>
  Status wait(G g, Latch latch, int groups) const {
    return leader(g, [&] {
      while ((*counts)[static_cast<int>(latch)].load(std::memory_order_acquire) < groups) {
        if (std::chrono::steady_clock::now() > deadline)
          return Status{Code::timeout, Phase::none, -1, static_cast<int32_t>(latch)};
        std::this_thread::yield();
      }
      return Status{};
    });
  }
  template <class G>
  bool open(G, Latch latch) const {
    return (*counts)[static_cast<int>(latch)].load(std::memory_order_acquire) > 0;
  }
  template <class G>
  void note(G, const Status&) const {}  // its group returns it
};

// role(group, fabric, latches, self) on workers + 1 groups; the first Status by group that is not ok.
template <class Role>
Status run_groups(RankState& me, int workers, int senders, int lanes, Role&& role) {
  std::array<std::atomic<int>, static_cast<int>(Latch::count)> counts{};
  std::vector<HostState> own(workers + 1, me.host);
  std::vector<Status> said(workers + 1);
  {
    std::vector<std::jthread> groups;
    for (int i = 0; i <= workers; ++i)
      groups.emplace_back([&, i] {
        own[i].counters = {};
        const GroupFabric fabric{{&own[i], &me.loopback}};
        said[i] = execute(lanes, [&](auto group) {
          return role(group, fabric, HostLatches{&counts, me.host.deadline}, GroupIndex{i, workers, senders});
        });
      });
  }
  for (const Status& s : said)
    if (!s.ok()) return s;
  return {};
}

}  // namespace world
