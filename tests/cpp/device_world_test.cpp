// Whole worlds over the cuda world's own fabric, gates and schedule: every warp is 32 threads, over an emulated copy
// engine. Only what the GPU's compiler and hardware do is missing.
#include "fabric/cuda/ptx.cuh"   // the emulated one, before anything that includes it

#include "rounds.hpp"
#include "world/cuda/seat.cuh"

using namespace world;

namespace {

// A rank's device state: links, gates, a piece of shared memory per warp.
struct DeviceRunner {
  static constexpr uint32_t kStage = 256;

  Status dispatch(World& w, int r, const Case& c, const DispatchWork& work) {
    return run(w, r, c, [&](Warp g, auto fabric, auto gates, Seat seat) { return dispatch_seat(g, fabric, gates, work, seat, [] {}); });
  }
  Status combine(World& w, int r, const Case& c, const CombineArgs& args) {
    return run(w, r, c, [&](Warp g, auto fabric, auto gates, Seat seat) { return combine_seat(g, fabric, gates, args, seat); });
  }

 private:
  template <class Role>
  Status run(World& w, int r, const Case& c, Role&& role) {
    RankState& me = w.rank(r);
    const Geometry& g = me.host.geometry;
    std::vector<char*> regions;
    for (int n = 0; n < g.nodes(); ++n) regions.push_back(w.rank(g.rail_rank(n)).region.data.get());
    uint64_t same_device = 0x5;   // further copies cross a link on their way to odd local ranks
    uint64_t gates[static_cast<int>(Gate::count)] = {}, failed[2] = {};
    FaultRecord record{};
    Counters counters;
    cuda::Call call;
    call.links = {.geometry = g, .windows = me.host.windows, .rail_region = me.region.data.get(), .regions = regions.data(), .same_device = &same_device,
                  .window_faults = me.view.node.faults, .region_faults = me.view.rail.faults, .region_peers = g.nodes(), .own_peer = g.node(),
                  .failed = failed, .fault = &record, .counters = &counters};
    call.spread = {.sms = 1, .warps = c.workers + 1, .senders = c.senders, .stage_bytes = kStage};
    call.timeout_ns = 60'000'000'000;
    call.gates = gates;
    const int seats = c.workers + 1;
    std::vector<Heap> shared;
    for (int i = 0; i < seats; ++i) shared.emplace_back(align_up(warp_shared_bytes(kStage), 4096));
    {
      std::vector<std::jthread> warps;
      for (int i = 0; i < seats; ++i)
        warps.emplace_back([&, i] {
          emulated::run_warp([&] { cuda::take_seat(call, LoopbackDeviceRail{call.links.regions}, i, seats, shared[i].data.get(), role); });
        });
    }
    return record.code ? record.status : Status{};
  }
};

std::vector<Case> cases() {
  const Case base{.nodes = 2, .per_node = 1, .channels = 2, .hidden = 1032, .rounds = 2, .workers = 2, .senders = 1};   // rows longer than some stages
  std::vector<Case> all;
  Case c = base; all.push_back(c);
  c.layout = RowLayout::rank; all.push_back(c);
  c = base; c.nodes = 1; c.per_node = 3; c.senders = 2; c.alignment = 4; c.spare = 3; all.push_back(c);
  c = base; c.nodes = 3; c.per_node = 1; c.check = true; all.push_back(c);
  c = base; c.hidden = 1152; c.fused = ScaleKind::f32; all.push_back(c);
  c = base; c.hidden = 1152; c.wire = Wire::logfmt10; c.nodes = 3; c.per_node = 1; all.push_back(c);
  return all;
}

}  // namespace

TEST_CASES(device_worlds, cases()) { world::run_case(value, DeviceRunner{}); }
