// HostFabric: the Fabric of the cpu and team worlds. Node windows are mapped memory; the rail is a type
// parameter (loopback between rank threads, UCX between processes), so nothing here is virtual.
#pragma once
#include <sched.h>

#include <algorithm>
#include <utility>

#include "fabric/cpu/report.hpp"
#include "fabric/fabric.hpp"

namespace moecomm {

// What the peers of put() are reached by. None of it throws or blocks.
template <class Rail>
concept HostRail = requires(Rail& rail, const char* source) {
  rail.put(0, uint64_t{}, source, uint64_t{});      // (peer, offset there, source, bytes)
  rail.signal(0, uint64_t{}, uint64_t{});           // (peer, counter, add)
  { rail.reach(0) } -> std::same_as<char*>;         // the peer's region where stores get there, else null
  { rail.progress() } -> std::same_as<bool>;        // whether something moved
  { rail.lost(0) } -> std::same_as<int>;            // the rank, where its link is gone; else -1
  { rail.flush_poll() } -> std::same_as<bool>;      // whether all puts and signals are complete
  { Rail::kNetwork } -> std::convertible_to<bool>;  // true: nothing wakes a waiter when a put lands
};

namespace detail {

using Clock = std::chrono::steady_clock;

// What waiting costs: look a few times, then give the core away (on a busy machine the peer needs it
// to do what we wait for), then sleep until woken. Sleeps are bounded so that dead peers are noticed.
constexpr int kLooks = 16;
constexpr int kYields = 1000;
constexpr std::chrono::milliseconds kYielding{
    5};                              // at most: on a busy machine one yield may take longer than this
constexpr int64_t kNap = 5'000'000;  // ns; woken earlier by the signal itself
constexpr int64_t kNapWithNetwork = 100'000;  // ns; nothing wakes us when a put lands from the network

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

template <HostRail Rail>
Status wait_counter(HostState& s, Rail& rail, char* memory, CounterAt at, uint64_t at_least, Phase phase,
                    int peer) {
  Counter& c = counter_at(memory, at.value);
  const auto arrived = [&] { return c.load(std::memory_order_acquire) >= at_least; };
  s.fault.strikes(Fault::Point::wait, phase);
  if (arrived()) return {};
  for (int i = 0; i < kLooks; ++i) {
    relax();
    if (arrived()) return {};
  }
  Clock::time_point next_check = Clock::now();
  s.look(next_check);
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
    s.look(now);
    if (now >= next_check) {
      next_check = now + std::chrono::milliseconds(5);
      const int dead = s.watch->lost(peer), unreachable = dead < 0 ? rail.lost(peer) : -1;
      if (const Status self = own_absence(s, phase, unreachable, at_least, c.load());
          !self.ok() && !arrived())
        return self;
      if (interrupted && interrupted())
        return {Code::interrupted, phase, s.geometry.rank, 0, at_least, c.load()};
      // Arrived data wins over a dead peer: what a rank sent before it died is still complete.
      if (Status fault = reported_fault(s); !fault.ok() && !arrived()) {
        if (fault.code == Code::timeout)
          return settle_timeout(s, rail, {Code::timeout, phase, peer, 0, at_least, c.load()});
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
      if (now >= s.deadline)
        return settle_timeout(s, rail, {Code::timeout, phase, peer, 0, at_least, c.load()});
    }
    if (moved) continue;
    sleeping_at(memory).store(at.value, std::memory_order_seq_cst);
    const uint64_t seen = c.load(std::memory_order_seq_cst);
    if (seen < at_least) futex_sleep(c, seen, Rail::kNetwork ? kNapWithNetwork : kNap);
    sleeping_at(memory).store(0, std::memory_order_relaxed);
  }
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
  template <class G>
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
  template <class G>
  void spread_row(G g, char* const* targets, int count, const char* src, uint64_t bytes) const {
    for (int i = 0; i < count; ++i) copy_row(g, targets[i], src, bytes);
  }
  template <class G>
  void settle(G g) const {
    g.sync();
  }
  // Shared memory: a row that is in the caches is written again faster than its first copy is read back.
  static constexpr bool replicates(int) { return true; }
  template <class G>
  void zero_row(G g, char* dst, uint64_t bytes) const {
    if (g.lane() == 0) s->kernels->zero(dst, bytes);
  }
  template <class G>
  void reduce_rows(G g, char* dst, const Terms& terms, const Terms* next, const float* bias, int64_t hidden,
                   DType type) const {
    s->fault.strikes(Fault::Point::reduce);
    const auto [begin, end] = tiles_of_lane(g, hidden);
    if (begin < end)
      s->kernels->reduce(dst, terms, ahead(g, next), bias, begin, end, type, s->stream && g.size() == 1);
  }
  template <class G>
  void reduce_encode(G g, char* dst, Wire wire, const Terms& terms, const Terms* next, int64_t hidden,
                     DType type) const {
    const auto [begin, end] = tiles_of_lane(g, hidden);
    if (begin < end) s->kernels->reduce_encode(dst, wire, terms, ahead(g, next), begin, end, hidden, type);
  }
  template <class G>
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
  template <class G>
  static const Terms* ahead(G g, const Terms* next) {
    return g.size() == 1 ? next : nullptr;
  }
  // Lanes take contiguous runs of whole tiles.
  template <class G>
  static std::pair<int64_t, int64_t> tiles_of_lane(G g, int64_t hidden) {
    const int64_t slice = static_cast<int64_t>(align_up((hidden + g.size() - 1) / g.size(), kTile));
    return {slice * g.lane(), std::min(slice * (g.lane() + 1), hidden)};
  }
};

}  // namespace moecomm
