// A group takes its seat: shared memory, fabric, gates; and what a kernel does around a role.
#pragma once
#include "fabric/cuda/device.cuh"
#include "fabric/cuda/squad.cuh"
#include "runtime/cuda/kernels/launch.hpp"

namespace moecomm::cuda {

// Extra time for waits inside a rank, so that the wait for the peer expires first and the error names the
// peer.
constexpr uint64_t kGrace =
    1'000'000'000;  // ns; costs nothing: as soon as the record is there, everything else ends

// Gates are counters in this rank's device memory, released and acquired at GPU scope.
template <class Fabric>
struct DeviceGates {
  uint64_t* counts;
  Fabric fabric;

  template <class G>
  __device__ void arrive(G g, Gate gate) const {
    g.sync();
    if (g.lane() == 0) {
      fabric.complete();
      ptx::add_release_gpu(counts + static_cast<int>(gate), 1);
    }
    g.sync();
  }
  template <class G>
  __device__ Status wait(G g, Gate gate, int groups) const {
    return leader(g,
                  [&] { return reach(counts + static_cast<int>(gate), groups, static_cast<int32_t>(gate)); });
  }
  template <class G>
  __device__ bool open(G g, Gate gate) const {
    const uint64_t groups = g.lane() == 0 ? ptx::load_acquire_gpu(counts + static_cast<int>(gate)) : 0;
    return g.broadcast(static_cast<int>(groups), 0) > 0;
  }

 protected:
  // One lane: until `count` is that far.
  __device__ Status reach(const uint64_t* count, uint64_t at_least, int32_t which) const {
    Status s;
    for (int polls = 1; s.ok() && ptx::load_acquire_gpu(count) < at_least; ++polls) {
      if (polls % kPollsPerCheck) continue;
      if (fabric.failed())
        s = {Code::lost, Phase::none, fabric.links->geometry.rank, 1, 0, 0};
      else if (ptx::nanoseconds() >= fabric.deadline + kGrace)
        s = {Code::timeout, Phase::none, fabric.links->geometry.rank, which, at_least, *count};
    }
    ptx::proxy_fence();
    return s;
  }
};

// Where all groups of a rank meet. The count is never set back (a call that has failed aside), so a captured
// call needs no other work before it: the arrivals before this one say which round this is.
template <class Fabric>
struct DeviceMeeting : DeviceGates<Fabric> {
  int warps;  // of a group
  int all;    // of the rank

  template <class G>
  __device__ Status meet(G g) const {
    g.sync();
    return leader(g, [&] {
      this->fabric.complete();
      const uint64_t before = ptx::fetch_add_acq_rel_gpu(this->counts, warps);
      return this->reach(this->counts, (before / all + 1) * all, 0);
    });
  }
};

// Calls role(fabric) and reports its Status; once per group of a kernel, by all its lanes, with its own piece
// of shared memory.
template <bool kMeets, class G, class Rail, class Role>
__device__ void take_part(G g, const Call& call, Rail rail, char* shared, Role role) {
  WarpScratch* scratch = WarpScratch::open(g, shared, call.spread.stage_bytes, call.spread.stages,
                                           kMeets ? call.links.failed : nullptr);
  // A call before has failed: groups that meet take no part. One lane has looked: another squad may fail now,
  // and lanes that disagreed would not meet again. Here, before the role: behind it a register more is live
  // in decode's sum, which spills.
  if (scratch->late) return;
  const DeviceFabric<Rail> fabric{&call.links, rail, scratch, ptx::nanoseconds() + call.timeout_ns};
  Status s = role(fabric);
  if (g.lane() != 0) return;
  if (!is_final(s)) {  // a refused call's puts too: a later call's signal could overtake them
    const Status unread = fabric.flush();
    if (!unread.ok()) s = unread;
  }
  fabric.complete();  // shared memory goes with the block
  if (!s.ok()) fabric.fail(s);
  const auto* counted = reinterpret_cast<const unsigned long long*>(&scratch->counters);
  auto* totals = reinterpret_cast<unsigned long long*>(call.links.counters);
  for (unsigned i = 0; i < sizeof(Counters) / 8; ++i)
    if (counted[i]) atomicAdd(totals + i, counted[i]);
}

// One lane, for a host that waits: how many rows there will be, and where.
inline __device__ void tell_placed(const DispatchLaunch& launch) {
  const DispatchArgs& a = launch.work.args;
  const int me = a.b.geometry.local();
  launch.placed->rows = a.plan.call.capacity >= 0 ? a.plan.call.capacity : a.plan.rank_rows[me];
  launch.placed->needed = a.needed[me];
  launch.placed->offset = a.target[me].rows;
  launch.placed->verdict = a.verdict->code;
  ptx::store_release_sys(&launch.placed->ticket, launch.ticket);
}

// Calls role(warp, fabric, gates, seat); all warps of a call do so once, each with its own index.
template <class Rail, class Role>
__device__ void take_seat(const Call& call, Rail rail, int index, int seats, char* shared, Role role) {
  const Warp g;
  const int workers = seats - 1, senders = call.spread.senders > 0 && call.spread.senders < workers
                                               ? call.spread.senders
                                               : workers;
  take_part<false>(g, call, rail, shared, [=, &call](auto fabric) {
    return role(g, fabric, DeviceGates<decltype(fabric)>{call.gates, fabric}, Seat{index, workers, senders});
  });
}

// Calls role(squad, fabric, meeting, index) on one of `groups` squads.
template <class Rail, class Role>
__device__ void join_squad(const Call& call, Rail rail, Squad g, int index, int groups, char* shared,
                           Role&& role) {
  take_part<true>(g, call, rail, shared, [&](auto fabric) {
    return role(g, fabric, DeviceMeeting<decltype(fabric)>{{call.gates, fabric}, g.warps, g.warps * groups},
                index);
  });
}

}  // namespace moecomm::cuda
