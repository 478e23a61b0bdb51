// Waits: statistics of which ranks this rank has waited for, and how long. Written by the thread that waits,
// read by any thread.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>

#include "base/types.hpp"

namespace moecomm {

class Waits {
 public:
  using Clock = std::chrono::steady_clock;
  struct Entry {
    std::atomic<uint64_t> count{0}, nanoseconds{0};
    std::atomic<int64_t> progress{
        0};  // when the latest successful wait ended, nanoseconds of the clock; 0: never
  };

  explicit Waits(int ranks) : ranks_(ranks), entries_(new Entry[ranks]) {}
  int ranks() const { return ranks_; }
  const Entry& of(int rank) const { return entries_[rank]; }
  // The rank that this rank waits for; -1: it does not wait.
  int waiting_for() const { return waiting_.load(std::memory_order_relaxed); }
  int64_t since() const { return since_.load(std::memory_order_relaxed); }  // nanoseconds of the clock
  Phase phase() const { return phase_.load(std::memory_order_relaxed); }

  void begin(int rank, Phase phase, Clock::time_point now) {
    if (rank < 0 || rank >= ranks_) return;
    since_.store(now.time_since_epoch().count(), std::memory_order_relaxed);
    phase_.store(phase, std::memory_order_relaxed);
    waiting_.store(rank, std::memory_order_relaxed);
  }
  void end(int rank, Clock::time_point began, bool came) {
    if (rank < 0 || rank >= ranks_) return;
    const Clock::time_point now = Clock::now();
    Entry& e = entries_[rank];
    e.count.fetch_add(1, std::memory_order_relaxed);
    e.nanoseconds.fetch_add((now - began).count(), std::memory_order_relaxed);
    if (came) e.progress.store(now.time_since_epoch().count(), std::memory_order_relaxed);
    waiting_.store(-1, std::memory_order_relaxed);
  }

 private:
  int ranks_;
  std::unique_ptr<Entry[]> entries_;
  std::atomic<int> waiting_{-1};
  std::atomic<int64_t> since_{0};
  std::atomic<Phase> phase_{Phase::none};
};

}  // namespace moecomm
