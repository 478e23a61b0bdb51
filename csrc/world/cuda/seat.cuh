// A warp takes its seat: shared memory, fabric, gates; and what a kernel does around a role.
#pragma once
#include "fabric/cuda/device.cuh"
#include "world/cuda/launch.hpp"

namespace moecomm::cuda {

// Gates are counters in this rank's device memory, released and acquired at GPU scope.
template <class Fabric>
struct DeviceGates {
  uint64_t* counts;
  Fabric fabric;

  __device__ void arrive(Warp g, Gate gate) const {
    g.sync();
    if (g.lane() == 0) {
      fabric.complete();
      ptx::add_release_gpu(counts + static_cast<int>(gate), 1);
    }
    g.sync();
  }
  __device__ Status wait(Warp g, Gate gate, int groups) const {
    return leader(g, [&] {
      const uint64_t* count = counts + static_cast<int>(gate);
      Status s;
      for (int polls = 1; s.ok() && ptx::load_acquire_gpu(count) < static_cast<uint64_t>(groups); ++polls) {
        if (polls % kPollsPerCheck) continue;
        if (fabric.failed()) s = {Code::lost, Phase::none, fabric.links->geometry.rank, 1, 0, 0};
        else if (ptx::nanoseconds() >= fabric.deadline)
          s = {Code::timeout, Phase::none, fabric.links->geometry.rank, static_cast<int32_t>(gate), static_cast<uint64_t>(groups), *count};
      }
      ptx::proxy_fence();
      return s;
    });
  }
};

// Calls role(warp, fabric, gates, seat) and reports its Status; all warps of a call do so once, each with its own
// index and piece of shared memory.
template <class Rail, class Role>
__device__ void take_seat(const Call& call, Rail rail, int index, int seats, char* shared, Role&& role) {
  const Warp g;
  const int workers = seats - 1, senders = call.spread.senders > 0 && call.spread.senders < workers ? call.spread.senders : workers;
  WarpScratch* scratch = WarpScratch::open(shared, call.spread.stage_bytes, g.lane());
  const DeviceFabric<Rail> fabric{&call.links, rail, scratch, ptx::nanoseconds() + call.timeout_ns};
  const DeviceGates<DeviceFabric<Rail>> gates{call.gates, fabric};
  const Status s = role(g, fabric, gates, Seat{index, workers, senders});
  if (g.lane() != 0) return;
  if (!s.ok()) fabric.fail(s);
  fabric.complete();   // shared memory goes with the block
  const auto* counted = reinterpret_cast<const unsigned long long*>(&scratch->counters);
  auto* totals = reinterpret_cast<unsigned long long*>(call.links.counters);
  for (unsigned i = 0; i < sizeof(Counters) / 8; ++i)
    if (counted[i]) atomicAdd(totals + i, counted[i]);
}

}  // namespace moecomm::cuda
