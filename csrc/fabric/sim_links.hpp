// What the simulated links are made of: a cluster's rates, and two kinds of server for them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "exec/fiber.hpp"

namespace moecomm {

// Times in nanoseconds, rates in bytes per nanosecond (GB/s), each direction.
struct Hardware {
  double node_rate = 160;        // load/store domain inside a node, per rank
  double node_latency = 800;
  double rail_rate = 50;         // network, per rank
  double rail_latency = 2500;
  double rail_message = 5;       // a NIC's time per message
  double sm_read = 200;          // one multiprocessor's row operations
  double sm_write = 50;
  double put = 50;               // a role's time to post a put or a signal
  double poll = 200;             // from a counter's change to the waiter's next instruction
  double launch = 4000;          // start of a kernel
  double plan_token = 0.5;       // counting, per token
};

constexpr double kPicosecondsPerNanosecond = 1000.0;
inline Time picoseconds(double ns) { return static_cast<Time>(ns * kPicosecondsPerNanosecond + 0.5); }
inline Time transfer_time(uint64_t bytes, double rate) { return picoseconds(static_cast<double>(bytes) / rate); }

// First come, first served: for resources that are asked for in the order of time. Those who ask in turn,
// row by row, share it fairly.
class Queue {
 public:
  Time take(Time from, Time work) {
    free_ = std::max(free_, from) + work;
    busy_ += work;
    return free_;
  }
  Time busy() const { return busy_; }
  void clear() { free_ = busy_ = 0; }

 private:
  Time free_ = 0;
  Time busy_ = 0;
};

// A receiving link. Messages are announced when they are sent, not in the order in which they arrive, so
// a queue would let a message that arrives late hold up one that arrives early. Time is cut into bins;
// a message takes what is left of the bins from its arrival on.
class Calendar {
 public:
  Time take(Time from, Time work) {
    busy_ += work;
    uint64_t bin = find(from / kBin);
    Time left = work;
    for (;;) {
      const Time room = kBin - used_[bin];
      if (left <= room) {
        used_[bin] += static_cast<uint32_t>(left);
        const Time end = bin * kBin + used_[bin];
        if (used_[bin] == kBin) next_[bin] = static_cast<uint32_t>(bin + 1);
        return std::max(end, from + work);
      }
      left -= room;
      used_[bin] = kBin;
      next_[bin] = static_cast<uint32_t>(bin + 1);
      bin = find(bin + 1);
    }
  }
  Time busy() const { return busy_; }
  void clear() {
    used_.clear();
    next_.clear();
    busy_ = 0;
  }

 private:
  static constexpr Time kBin = 1u << 19;   // ps: half a microsecond
  // The first bin from `bin` on that has room; full ones point past themselves.
  uint64_t find(uint64_t bin) {
    grow(bin);
    uint64_t root = bin;
    while (next_[root] != root) {
      root = next_[root];
      grow(root);
    }
    while (next_[bin] != root) {
      const uint64_t after = next_[bin];
      next_[bin] = static_cast<uint32_t>(root);
      bin = after;
    }
    return root;
  }
  void grow(uint64_t bin) {
    while (next_.size() <= bin) {
      next_.push_back(static_cast<uint32_t>(next_.size()));
      used_.push_back(0);
    }
  }
  std::vector<uint32_t> used_;   // picoseconds taken
  std::vector<uint32_t> next_;
  Time busy_ = 0;
};

}  // namespace moecomm
