// The model of the simulated links: a cluster's rates, and how its resources are shared.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "exec/fiber.hpp"

namespace moecomm {

// Times in nanoseconds, rates in bytes per nanosecond (GB/s) in each direction.
struct Hardware {
  double node_rate = 160;  // load/store domain inside a node, per rank
  double node_latency = 800;
  double rail_rate = 50;  // network, per rank
  double rail_latency = 2500;
  double rail_message = 5;  // a NIC's time per message
  double sm_read = 200;     // one multiprocessor's row operations
  double sm_write = 50;
  double put = 50;          // a role's time to post a put or a signal
  double poll = 200;        // from a counter's change to the waiter's next instruction
  double launch = 4000;     // start of a kernel
  double plan_token = 0.5;  // counting, per token
};

constexpr double kPicosecondsPerNanosecond = 1000.0;
inline Time picoseconds(double ns) { return static_cast<Time>(ns * kPicosecondsPerNanosecond + 0.5); }

// The duration of a transfer at one rate. Keeps the last result, because most transfers have the same length.
class Rate {
 public:
  explicit Rate(double bytes_per_ns) : rate_(bytes_per_ns) {}
  Time time(uint64_t bytes) {
    if (bytes != bytes_) {
      bytes_ = bytes;
      time_ = picoseconds(static_cast<double>(bytes) / rate_);
    }
    return time_;
  }

 private:
  double rate_;
  uint64_t bytes_ = 0;
  Time time_ = 0;
};

// A resource that serves one user at a time: a link, a NIC, a multiprocessor's row operations. Requests are
// not made in the order of their start times (messages are announced when they are sent, not when they
// arrive, and roles run ahead), so in a queue a later user could delay an earlier one. Therefore time is
// divided into bins, and a user takes the free time of the bins from its arrival on. Users that alternate,
// row by row, share the resource fairly.
class Calendar {
 public:
  // Reserves `work` from time `from` on. Returns when it is done.
  Time take(Time from, Time work) {
    busy_ += work;
    uint64_t bin = find(from / kBin);
    Time left = work;
    for (;;) {
      uint32_t& used = at(bin);
      const Time room = kBin - used;
      if (left < room) {
        used += static_cast<uint32_t>(left);
        return std::max(bin * kBin + used, from + work);
      }
      left -= room;
      used = kFull | static_cast<uint32_t>(bin + 1);
      bin = find(bin + 1);
    }
  }
  // A hint that take() will be called soon with about this start time.
  void expect(Time from) const {
    const uint64_t bin = from / kBin - first_;
    if (bin < bins_.size()) __builtin_prefetch(&bins_[bin]);
  }
  Time busy() const { return busy_; }
  void clear() {
    bins_.clear();
    busy_ = 0;
  }

 private:
  static constexpr Time kBin = 1u << 20;  // ps: about a microsecond
  static constexpr uint32_t kFull = 1u << 31;
  static constexpr uint64_t kMargin =
      16;  // additional bins, before the first requested one and behind the last

  // The first bin from `bin` on that is not full.
  uint64_t find(uint64_t bin) {
    reach(bin);
    while (at(bin) & kFull) {
      const uint64_t after = at(bin) & ~kFull;
      reach(after);
      if (at(after) & kFull) at(bin) = at(after);  // path halving: later searches are shorter
      bin = after;
    }
    return bin;
  }
  uint32_t& at(uint64_t bin) { return bins_[bin - first_]; }
  void reach(uint64_t bin) {
    if (bins_.empty()) first_ = bin - std::min(bin, kMargin);
    if (bin < first_) {
      bins_.insert(bins_.begin(), first_ - bin, 0);
      first_ = bin;
    }
    if (bin - first_ >= bins_.size()) bins_.resize(bin - first_ + kMargin, 0);
  }

  std::vector<uint32_t> bins_;  // used ps; for a full bin: kFull and the number of a later bin
  uint64_t first_ = 0;          // number of the first bin in bins_
  Time busy_ = 0;
};

}  // namespace moecomm
