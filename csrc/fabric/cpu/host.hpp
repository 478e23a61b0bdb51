// HostFabric: the Fabric of the cpu and team worlds. Node windows are mapped memory. The rail is a type
// parameter (loopback between rank threads, UCX between processes), so no call is virtual.
#pragma once
#include <sched.h>

#include <algorithm>
#include <utility>

#include "fabric/cpu/report.hpp"
#include "fabric/fabric.hpp"

namespace moecomm {

namespace detail {

using Clock = std::chrono::steady_clock;

// A wait first polls a few times, then yields the core (on a busy machine the peer may need it), then sleeps
// until it is woken. Sleeps are bounded, so that dead peers are noticed.
constexpr int kPolls = 16;
constexpr int kYields = 1000;
constexpr std::chrono::milliseconds kYielding{5};  // a limit: on a busy machine one yield can take very long
constexpr int64_t kSleep = 5'000'000;              // ns; the signal wakes the rank earlier
constexpr int64_t kSleepWithNetwork = 100'000;     // ns; a put from the network does not wake the rank

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// The rest of a wait, after the first few polls. began: now.
template <HostRail Rail>
Status wait_longer(HostState& s, Rail& rail, char* memory, CounterAt at, uint64_t at_least, Phase phase,
                   int peer, Clock::time_point began) {
  Counter& c = counter_at(memory, at.value);
  const auto arrived = [&] { return c.load(std::memory_order_acquire) >= at_least; };
  Clock::time_point next_check = began;
  s.check_absence(next_check);
  const Clock::time_point sleepy = next_check + kYielding;
  for (int i = 0; i < kYields && next_check < sleepy; ++i, next_check = Clock::now()) {
    rail.progress();
    sched_yield();
    if (arrived()) return {};
  }
  for (;;) {
    const bool moved = rail.progress();
    if (arrived()) return {};
    const Clock::time_point now = Clock::now();
    s.check_absence(now);
    if (now >= next_check) {
      next_check = now + std::chrono::milliseconds(5);
      const int dead = s.watch->lost(peer), unreachable = dead < 0 ? rail.lost(peer) : -1;
      if (const Status self = own_absence(s, phase, unreachable, at_least, c.load());
          !self.ok() && !arrived())
        return self;
      if (interrupted && interrupted())
        return {Code::interrupted, phase, s.geometry.rank, 0, at_least, c.load()};
      // Arrived data takes precedence over a failure: what a rank sent before it died is complete.
      if (Status fault = reported_fault(s); !fault.ok() && !arrived()) {
        if (fault.code == Code::timeout)
          return blame_timeout(s, rail, {Code::timeout, phase, peer, 0, at_least, c.load()});
        fault.phase = phase;
        if (fault.code != Code::corrupt) {
          fault.expected = at_least;
          fault.got = c.load();
        }
        return fault;
      }
      if (const Status other = other_call(s, phase); !other.ok() && !arrived()) return other;
      if (const int lost = std::max(dead, unreachable); lost >= 0 && !arrived())
        return {Code::lost, phase, lost, 0, at_least, c.load()};
      s.check_beat(peer, now);
      if (now >= s.deadline)
        return blame_timeout(s, rail, {Code::timeout, phase, peer, 0, at_least, c.load()});
    }
    if (moved) continue;
    sleeping_at(memory).store(at.value, std::memory_order_seq_cst);
    const uint64_t seen = c.load(std::memory_order_seq_cst);
    if (seen < at_least) futex_sleep(c, seen, Rail::kNetwork ? kSleepWithNetwork : kSleep);
    sleeping_at(memory).store(0, std::memory_order_relaxed);
  }
}

// Waits until the sources of all puts may be overwritten and the bytes of all gets have arrived. For a failed
// peer UCX completes the operations with an error.
template <HostRail Rail>
Status drain(HostState& s, Rail& rail, Phase phase, int peer) {
  for (Clock::time_point now; !rail.drained();) {
    if (!rail.progress()) sched_yield();
    if (rail.drained()) break;
    s.check_absence(now = Clock::now());
    if (interrupted && interrupted()) return {Code::interrupted, phase, s.geometry.rank, 0, 1, 0};
    if (const int dead = s.watch->lost(peer); dead >= 0) return {Code::lost, phase, dead, 0, 1, 0};
    s.check_beat(peer, now);
    if (now >= s.deadline) return blame_timeout(s, rail, {Code::timeout, phase, peer, 0, 1, 0});
  }
  if (const int lost = rail.lost(peer); lost >= 0) return {Code::lost, phase, lost, 0, 1, 0};
  return {};
}

template <HostRail Rail>
Status wait_counter(HostState& s, Rail& rail, char* memory, CounterAt at, uint64_t at_least, Phase phase,
                    int peer) {
  Counter& c = counter_at(memory, at.value);
  const auto arrived = [&] { return c.load(std::memory_order_acquire) >= at_least; };
  s.fault.strikes(Fault::Point::wait, phase);
  if (arrived()) return {};
  for (int i = 0; i < kPolls; ++i) {
    relax();
    if (arrived()) return {};
  }
  const Clock::time_point began = Clock::now();
  Waits* const waits = s.call ? s.call->waits : nullptr;
  if (waits) waits->begin(peer, phase, began);
  const Status status = wait_longer(s, rail, memory, at, at_least, phase, peer, began);
  if (waits) waits->end(peer, began, status.ok());
  return status;
}

}  // namespace detail

template <HostRail Rail>
struct HostFabric {
  static constexpr bool kPutsFromAnywhere = true;
  HostState* s;
  Rail* rail_link;

  char* window(int local) const { return s->windows[local]; }
  template <class T>
  T* window(int local, Offset<T> at) const {
    return at.in(s->windows[local]);
  }
  template <class T>
  T* rail(Offset<T> at) const {
    return at.in(s->rail_region);
  }

  char* reach(int peer, uint64_t offset) const {
    char* there = rail_link->reach(peer);
    return there ? there + offset : nullptr;
  }
  void put(int peer, uint64_t offset, const char* src, uint64_t bytes) const {
    if (s->fault.strikes(Fault::Point::put)) {
      if (s->fault.action == Fault::Action::omit) return;
      src = s->fault.damage(src, bytes);
    }
    char* there = s->stream ? reach(peer, offset) : nullptr;
    if (there)
      s->kernels->stream(there, src, bytes);
    else
      rail_link->put(peer, offset, src, bytes);
  }
  void get(int peer, char* to, uint64_t offset, uint64_t bytes) const {
    rail_link->get(peer, to, offset, bytes);
  }
  // peer: the rank to blame if the deadline passes.
  Status drain(Phase phase, int peer) const { return detail::drain(*s, *rail_link, phase, peer); }
  void signal_rail(int peer, CounterAt counter, uint64_t add) const {
    if (s->stream) s->kernels->fence();
    rail_link->signal(peer, counter.value, add);
  }
  void signal_node(int local, CounterAt counter, uint64_t add) const {
    if (s->stream) s->kernels->fence();
    add_and_wake(s->windows[local], counter.value, add);
  }
  Status wait_rail(CounterAt counter, uint64_t at_least, Phase phase, int peer) const {
    return detail::wait_counter(*s, *rail_link, s->rail_region, counter, at_least, phase, peer);
  }
  Status wait_node(CounterAt counter, uint64_t at_least, Phase phase, int peer) const {
    return detail::wait_counter(*s, *rail_link, s->windows[s->geometry.local()], counter, at_least, phase,
                                peer);
  }

  // Lanes take contiguous slices on 64-byte boundaries.
  template <Group G>
  void copy_row(G g, char* dst, const char* src, uint64_t bytes) const {
    const uint64_t slice = align_up((bytes + g.size() - 1) / g.size(), 64);
    const uint64_t begin = slice * g.lane();
    if (begin >= bytes) return;
    const uint64_t n = begin + slice < bytes ? slice : bytes - begin;
    if (s->fault.strikes(Fault::Point::copy)) {
      if (s->fault.action == Fault::Action::omit) return;
      src = s->fault.damage(src + begin, n) - begin;
    }
    if (s->stream && g.size() == 1)
      s->kernels->stream(dst + begin, src + begin, n);
    else
      s->kernels->copy(dst + begin, src + begin, n);
  }
  template <Group G>
  void spread_row(G g, char* const* targets, int count, const char* src, uint64_t bytes) const {
    for (int i = 0; i < count; ++i) copy_row(g, targets[i], src, bytes);
  }
  template <Group G>
  void finish_rows(G g) const {
    g.sync();
  }
  // In shared memory, writing a cached row again is faster than reading its first copy back.
  static constexpr bool replicates(int) { return true; }
  template <Group G>
  void zero_row(G g, char* dst, uint64_t bytes) const {
    if (g.lane() == 0) s->kernels->zero(dst, bytes);
  }
  template <Group G>
  void reduce_rows(G g, char* dst, const Terms& terms, const Terms* next, const float* bias, int64_t hidden,
                   DType type) const {
    s->fault.strikes(Fault::Point::reduce);
    const auto [begin, end] = tiles_of_lane(g, hidden);
    if (begin < end)
      s->kernels->reduce(dst, terms, ahead(g, next), bias, begin, end, type, s->stream && g.size() == 1);
  }
  template <Group G>
  void reduce_encode(G g, char* dst, Wire wire, const Terms& terms, const Terms* next, int64_t hidden,
                     DType type) const {
    const auto [begin, end] = tiles_of_lane(g, hidden);
    if (begin < end) s->kernels->reduce_encode(dst, wire, terms, ahead(g, next), begin, end, hidden, type);
  }
  template <Group G>
  void quantize_row(G g, char* codes, char* scales, const char* row, int64_t hidden, DType type,
                    ScaleKind kind) const {
    const auto [begin, end] = tiles_of_lane(g, hidden);
    if (begin < end) s->kernels->quantize(codes, scales, row, begin, end, hidden, type, kind);
  }
  Counters& counters() const { return s->counters; }
  std::vector<RoleSpan>* timeline() const { return s->timeline; }
  TermStore& terms(int which) const { return s->terms[which]; }
  char** targets() const { return s->targets; }

 private:
  // Other lanes may still be writing the list of the next row.
  template <Group G>
  static const Terms* ahead(G g, const Terms* next) {
    return g.size() == 1 ? next : nullptr;
  }
  // Lanes take contiguous runs of whole tiles.
  template <Group G>
  static std::pair<int64_t, int64_t> tiles_of_lane(G g, int64_t hidden) {
    const int64_t slice = static_cast<int64_t>(align_up((hidden + g.size() - 1) / g.size(), kTile));
    return {slice * g.lane(), std::min(slice * (g.lane() + 1), hidden)};
  }
};

}  // namespace moecomm
