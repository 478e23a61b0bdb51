// Runs a rank's calls with the fabric, latches and schedule of the cuda world: every warp is 32 threads, over
// an emulated copy engine. Only the GPU's compiler and hardware are not tested.
#pragma once
#include "fabric/cuda/ptx.cuh"  // the emulated one, before anything that includes it

#include <array>
#include <memory>

#include "rounds.hpp"
#include "runtime/cuda/kernels/run_group.cuh"

namespace world {

// A rank's device state: links, latches, and shared memory for each warp. network: DeviceLinks::network of
// every rank.
template <class Rail>
struct DeviceRunner {
  static constexpr uint32_t kStage = 256;
  std::vector<const void*> network = {};  // by rank
  struct Words {
    uint64_t latches[cuda::kLatchWords] = {}, failed[kFailedWords] = {};
  };
  // By rank, and never reset: the last group of a call does that.
  std::shared_ptr<std::array<Words, 64>> words = std::make_shared<std::array<Words, 64>>();

  Status dispatch(World& w, int r, const Case& c, const DispatchWork& work) {
    return run(w, r, c, [&](Warp g, auto fabric, auto latches, GroupIndex self) {
      return dispatch_group(g, fabric, latches, work, self, [] {});
    });
  }
  Status combine(World& w, int r, const Case& c, const CombineArgs& args) {
    return run(w, r, c, [&](Warp g, auto fabric, auto latches, GroupIndex self) {
      return combine_group(g, fabric, latches, args, self);
    });
  }

 private:
  template <class Role>
  Status run(World& w, int r, const Case& c, Role&& role) {
    RankState& me = w.rank(r);
    const Geometry& g = me.host.geometry;
    std::vector<char*> regions;
    for (int n = 0; n < g.nodes(); ++n) regions.push_back(w.rank(g.rail_rank(n)).region.data.get());
    uint64_t same_device = 0x5;  // further copies to odd local ranks cross a link
    auto& [latches, failed] = words->at(r);
    FaultRecord faults[kFaultRecords] = {};
    Counters counters;
    cuda::Call call;
    call.links = {.geometry = g,
                  .windows = me.host.windows,
                  .rail_region = me.region.data.get(),
                  .regions = regions.data(),
                  .network = network.empty() ? nullptr : network[r],
                  .region_offset = me.view.node.bytes,
                  .same_device = &same_device,
                  .window_faults = me.view.node.faults,
                  .region_faults = me.view.rail.faults,
                  .region_peers = g.nodes(),
                  .own_peer = g.node(),
                  .failed = failed,
                  .faults = {faults, faults + 1},
                  .counters = &counters};
    call.spread = {
        .sms = 1, .warps = c.workers + 1, .senders = c.senders, .stage_bytes = kStage, .stages = c.stages};
    call.timeout_ns = 60'000'000'000;
    call.latches = latches;
    const int groups = c.workers + 1;
    std::vector<Heap> shared;
    for (int i = 0; i < groups; ++i) shared.emplace_back(align_up(warp_shared_bytes(kStage, c.stages), 4096));
    {
      std::vector<std::jthread> warps;
      for (int i = 0; i < groups; ++i)
        warps.emplace_back([&, i] {
          emulated::run_warp([&] {
            cuda::run_as_warp(call, Rail::of(call.links, i), i, groups, shared[i].data.get(), role);
          });
        });
    }
    const FaultRecord& record = faults[1].code ? faults[1] : faults[0];
    return record.code ? record.status : Status{};
  }
};

}  // namespace world
