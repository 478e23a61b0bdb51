// Runs a role on a group of a kernel: sets up shared memory, the fabric and latches or a barrier, and reports
// how the role ends.
#pragma once
#include "fabric/cuda/device.cuh"
#include "fabric/cuda/squad.cuh"
#include "runtime/cuda/kernels/launch.hpp"
#include "session/calls.hpp"

namespace moecomm::cuda {

// Extra time for waits inside a rank, so that the wait for the peer expires first and the error names the
// peer.
constexpr uint64_t kGrace =
    1'000'000'000;  // ns; adds no delay, since all waits end once the record is written

// Latches are counters in this rank's device memory, with release and acquire at GPU scope.
template <LaneFabric F>
struct DeviceLatches {
  uint64_t* counts;
  F fabric;

  template <Group G>
  __device__ void arrive(G g, Latch latch) const {
    g.sync();
    if (g.lane() == 0) {
      fabric.complete();
      ptx::add_release_gpu(counts + static_cast<int>(latch), 1);
    }
    g.sync();
  }
  template <Group G>
  __device__ Status wait(G g, Latch latch, int groups) const {
    return leader(
        g, [&] { return reach(counts + static_cast<int>(latch), groups, static_cast<int32_t>(latch)); });
  }
  template <Group G>
  __device__ bool open(G g, Latch latch) const {
    const uint64_t groups = g.lane() == 0 ? ptx::load_relaxed_gpu(counts + static_cast<int>(latch)) : 0;
    return g.broadcast(static_cast<int>(groups), 0) > 0;
  }
  template <Group G>
  __device__ void note(G g, const Status& bad) const {
    if (g.lane() == 0) fabric.note(bad.detail, bad.expected, bad.got);  // in registers
  }

 protected:
  // One lane waits until `count` is at least `at_least`.
  __device__ Status reach(const uint64_t* count, uint64_t at_least, int32_t which) const {
    Status s;
    for (int polls = 1; s.ok() && ptx::load_relaxed_gpu(count) < at_least; ++polls) {
      if (polls % kPollsPerCheck) continue;
      if (fabric.failed())
        s = {Code::lost, Phase::none, fabric.links->geometry.rank, 1, 0, 0};
      else if (ptx::nanoseconds() >= fabric.scratch->deadline + kGrace)
        s = {Code::timeout, Phase::none, fabric.links->geometry.rank, which, at_least, *count};
    }
    ptx::load_acquire_gpu(count);
    ptx::proxy_fence();
    return s;
  }
};

// The barrier of all groups of a rank. The count is never reset, except after a failed call, so a captured
// call needs no work before it: the number of earlier arrivals gives the round.
template <LaneFabric F>
struct DeviceBarrier : DeviceLatches<F> {
  int warps;  // per group
  int all;    // warps of the rank

  template <Group G>
  __device__ Status wait(G g) const {
    g.sync();
    return leader(g, [&] {
      this->fabric.complete();
      const uint64_t before = ptx::fetch_add_release_gpu(this->counts, warps);
      return this->reach(this->counts, (before / all + 1) * all, 0);
    });
  }
};

// One lane sets the deadline and identifies the call. Every group reads the clock when it begins, and the
// last group that leaves advances it.
__device__ inline void enter_call(const Call& call, WarpScratch* scratch, int groups) {
  const uint64_t now = ptx::nanoseconds();
  scratch->deadline = now + call.timeout_ns;
  scratch->groups = groups;
  const CallClock* clock = call.links.clock;
  if (!clock) return;
  scratch->call_word = call.begins ? waiting_word(call.verb, call.memory, clock->number + 1) : clock->word;
  scratch->tell_at = now + kTellAfter;
}
// Squads have a barrier, whose count only grows. Other groups have latches, and the last group that
// leaves clears them: no group of the call looks at them any more, and the stream orders the next call.
template <bool kMeets>
__device__ void leave_call(const Call& call, const WarpScratch* scratch) {
  CallClock* clock = call.links.clock;
  if constexpr (kMeets) {
    if (!clock || !call.begins) return;
    if (atomicAdd(&clock->left, 1ull) + 1 < scratch->groups) return;
    clock->left = 0;
  } else {
    uint64_t* left = call.latches + kLeft;
    if (ptx::fetch_add_release_gpu(left, 1) + 1 < scratch->groups) return;
    ptx::load_acquire_gpu(left);  // all groups have left
    for (int i = 0; i < kLatchWords; ++i) call.latches[i] = 0;
    for (int i = 0; i < kFailedWords; ++i) call.links.failed[i] = 0;
    if (!clock || !call.begins) return;
  }
  clock->word = scratch->call_word;
  clock->number = number_of_waiting(scratch->call_word);
}

// Calls role(fabric) and reports its Status. All lanes of each group of a kernel call it once, with the
// group's own part of shared memory.
template <bool kMeets, Group G, DeviceRail Rail, class Role>
__device__ void run_group(G g, const Call& call, Rail rail, char* shared, int groups, Role role) {
  int stages = call.spread.stages;
  if constexpr (kMeets) stages = squad_stages(g.warps, call.spread.stage_bytes, stages);
  WarpScratch* scratch =
      WarpScratch::open(g, shared, call.spread.stage_bytes, stages, kMeets ? call.links.failed : nullptr);
  if (g.lane() == 0) enter_call(call, scratch, groups);  // lane 0 alone waits for peers
  // If an earlier call has failed, groups with barriers do nothing. One lane has read the flag for all,
  // because another squad may fail at this moment, and lanes that disagree would deadlock. The check is
  // before the role: after it, one register more would be live in decode's sum, which would spill.
  if (scratch->late) {
    if (g.lane() == 0) leave_call<kMeets>(call, scratch);
    return;
  }
  const DeviceFabric<Rail> fabric{&call.links, rail, scratch};
  Status s = role(fabric);
  if (g.lane() != 0) return;
  if (!call.awaited) end_unawaited(s, call.verb);
  if (!is_final(s)) {  // also after a refusal: a signal of a later call could overtake the puts of this one
    const Status unread = fabric.flush();
    if (!unread.ok()) s = unread;
  }
  fabric.complete();  // the shared memory is freed with the block
  if (!s.ok()) fabric.fail(s);
  const auto* counted = as<unsigned long long>(bytes_of(&scratch->counters));
  auto* totals = as<unsigned long long>(bytes_of(call.links.counters));
  for (unsigned i = 0; i < sizeof(Counters) / 8; ++i)
    if (counted[i]) atomicAdd(totals + i, counted[i]);
  leave_call<kMeets>(call, scratch);
}

// One lane reports the number of rows and their place to a host that waits.
inline __device__ void tell_placed(const DispatchLaunch& launch) {
  const DispatchArgs& a = launch.work.args;
  const int me = a.b.geometry.local();
  launch.placed->rows = a.plan.call.capacity >= 0 ? a.plan.call.capacity : a.plan.rank_rows[me];
  launch.placed->needed = a.needed[me];
  launch.placed->offset = a.target[me].rows;
  launch.placed->verdict = a.verdict->code;
  ptx::store_release_sys(&launch.placed->ticket, launch.ticket);
}

// Calls role(warp, fabric, latches, self). Every warp of a call calls it once, with its own index.
template <DeviceRail Rail, class Role>
__device__ void run_as_warp(const Call& call, Rail rail, int index, int groups, char* shared, Role role) {
  const Warp g;
  const int workers = groups - 1, senders = call.spread.senders > 0 && call.spread.senders < workers
                                                ? call.spread.senders
                                                : workers;
  run_group<false>(g, call, rail, shared, groups, [=, &call](auto fabric) {
    return role(g, fabric, DeviceLatches<decltype(fabric)>{call.latches, fabric},
                GroupIndex{index, workers, senders});
  });
}

// Calls role(squad, fabric, barrier, index) on one of `groups` squads.
template <DeviceRail Rail, class Role>
__device__ void run_as_squad(const Call& call, Rail rail, Squad g, int index, int groups, char* shared,
                             Role&& role) {
  // Inlined: a call would keep what is live on its stack.
  run_group<true>(g, call, rail, shared, groups, [&](auto fabric) __attribute__((always_inline)) {
    return role(g, fabric, DeviceBarrier<decltype(fabric)>{{call.latches, fabric}, g.warps, g.warps * groups},
                index);
  });
}

}  // namespace moecomm::cuda
