// What the simulated links are made of: a cluster's rates, and how its resources are shared.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "exec/fiber.hpp"

namespace moecomm {

// Times in nanoseconds, rates in bytes per nanosecond (GB/s), each direction.
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

// What one rate makes of bytes. Most transfers are as long as the one before.
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

// A resource that one user has at a time: a link, a NIC, a multiprocessor's copy engine. Users do not ask in
// the order in which they come (messages are announced when they are sent, not when they arrive; roles run
// ahead), so a queue would let a late one hold up an early one. Time is cut into bins; a user takes what is
// left of the bins from its arrival on. Those who ask in turn, row by row, share it fairly.
class Calendar {
 public:
  // When `work` that comes at `from` is done.
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
  // Whoever takes something at about `from` will look there soon.
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
      16;  // bins before the first that was asked for, and more than asked for behind

  // The first bin from `bin` on that has room.
  uint64_t find(uint64_t bin) {
    reach(bin);
    while (at(bin) & kFull) {
      const uint64_t after = at(bin) & ~kFull;
      reach(after);
      if (at(after) & kFull) at(bin) = at(after);  // every visit halves the way for the next one
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

  std::vector<uint32_t> bins_;  // ps that are used; of a full one, kFull and a bin behind it
  uint64_t first_ = 0;          // of bins_
  Time busy_ = 0;
};

}  // namespace moecomm
