// All ranks of a job in one process, with the memory of a Domain each, to test roles: as lanes on a CPU and
// as warps of an emulated GPU, over memory and over an emulated NCCL network.
#pragma once
#include "fabric/cuda/ptx.cuh"  // the emulated one, before anything that includes it

#include "fabric/cuda/domain.cuh"
#include "runtime/cuda/kernels/run_group.cuh"
#include "runtime/domain.hpp"
#include "world.hpp"

namespace world {

struct DomainRank {
  DomainRank(const Geometry& g, const DomainShape& s)
      : view(make_domain_view(g, s)), memory(view.at.bytes), counts(s.channels * consumed_words(g)) {
    for (int c = 0; c < s.channels; ++c)
      consumed.push_back(make_consumed(g, counts.data() + c * consumed_words(g)));
    host.geometry = g;
    host.window_faults = view.at.window_faults;
    host.region_faults = view.at.region_faults;
    host.fault_out = view.at.fault_out;
    for (int r = 0; r < g.size; ++r) host.peer_ranks.push_back(view.same_node(r) ? -1 : r);
    host.own_peer = g.rank;
    host.rail_region = memory.data.get();
    host.watch = &watch;
  }
  char* heap() { return memory.data.get() + view.at.heap.value; }

  DomainView view;
  Heap memory;
  std::vector<uint64_t> counts;
  std::vector<DomainConsumed> consumed;
  HostState host;
  LoopbackRail loopback;
  Watch watch;
};

class DomainWorld {
 public:
  DomainWorld(int size, int per_node, const DomainShape& shape) {
    for (int r = 0; r < size; ++r)
      ranks_.push_back(std::make_unique<DomainRank>(Geometry{r, size, per_node}, shape));
    for (auto& rank : ranks_) {
      const Geometry& g = rank->host.geometry;
      for (int l = 0; l < per_node; ++l)
        rank->host.windows[l] = ranks_[g.rank_at(g.node(), l)]->memory.data.get();
      std::vector<char*> regions;
      for (int r = 0; r < size; ++r)
        regions.push_back(rank->view.same_node(r) ? nullptr : ranks_[r]->memory.data.get());
      rank->loopback.attach(regions);
    }
  }
  int size() const { return static_cast<int>(ranks_.size()); }
  DomainRank& rank(int r) { return *ranks_[r]; }
  std::vector<char*> memories() const {
    std::vector<char*> all;
    for (const auto& rank : ranks_) all.push_back(rank->memory.data.get());
    return all;
  }

  // Runs role(group, fabric, rank, channel) on one lane per rank, channel by channel. Returns the Status of
  // every rank.
  template <class Role>
  std::vector<Status> on_lanes(Role&& role) {
    return each([&](int r) -> Status {
      DomainRank& me = rank(r);
      me.host.begin(std::chrono::seconds(60));
      for (int c = 0; c < me.view.shape.channels; ++c)
        MOE_TRY(role(Lane{}, HostFabric<LoopbackRail>{&me.host, &me.loopback}, r, c));
      return {};
    });
  }

  // The same with the fabric of the cuda world: a warp per channel. network: DeviceLinks::network of every
  // rank.
  template <class Rail, class Role>
  std::vector<Status> on_warps(Role&& role, const std::vector<const void*>& network = {}) {
    return each([&](int r) {
      DomainRank& me = rank(r);
      const Geometry& g = me.host.geometry;
      std::vector<char*> regions;
      for (int p = 0; p < g.size; ++p)
        regions.push_back(me.view.same_node(p) || !network.empty() ? nullptr : rank(p).memory.data.get());
      uint64_t same_device = 0, latches[cuda::kLatchWords] = {}, failed[kFailedWords] = {};
      FaultRecord faults[kFaultRecords] = {};
      Counters counters;
      const int channels = me.view.shape.channels;
      constexpr uint32_t kStage = 256;
      cuda::Call call;
      call.links = {.geometry = g,
                    .windows = me.host.windows,
                    .rail_region = me.memory.data.get(),
                    .regions = regions.data(),
                    .network = network.empty() ? nullptr : network[r],
                    .same_device = &same_device,
                    .window_faults = me.view.at.window_faults,
                    .region_faults = me.view.at.region_faults,
                    .region_peers = g.size,
                    .own_peer = g.rank,
                    .failed = failed,
                    .faults = faults,
                    .counters = &counters};
      call.spread = {.sms = 1, .warps = channels, .stage_bytes = kStage};
      call.timeout_ns = 60'000'000'000;
      call.latches = latches;
      std::vector<Heap> shared;
      for (int i = 0; i < channels; ++i) shared.emplace_back(align_up(warp_shared_bytes(kStage), 4096));
      {
        std::vector<std::jthread> warps;
        for (int i = 0; i < channels; ++i)
          warps.emplace_back([&, i] {
            emulated::run_warp([&] {
              cuda::run_as_warp(call, Rail::of(call.links, i), i, channels, shared[i].data.get(),
                                [&](Warp group, auto fabric, auto, GroupIndex self) {
                                  return role(group, DomainFabric<Rail>{fabric}, r, self.index);
                                });
            });
          });
      }
      const FaultRecord& record = faults[1].code ? faults[1] : faults[0];
      return record.code ? record.status : Status{};
    });
  }

 private:
  template <class Run>
  std::vector<Status> each(Run&& run) {
    std::vector<Status> all(size());
    std::vector<std::jthread> threads;
    for (int r = 0; r < size(); ++r) threads.emplace_back([&, r] { all[r] = run(r); });
    threads.clear();
    return all;
  }

  std::vector<std::unique_ptr<DomainRank>> ranks_;
};

}  // namespace world
