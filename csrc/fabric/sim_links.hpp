// What the simulated links are made of: a cluster's rates, and how its resources are shared.
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

// A resource that one user has at a time: a link, a NIC, a multiprocessor's copy engine. Users do not ask in the
// order in which they come (messages are announced when they are sent, not when they arrive; roles run
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
      Bin& b = bins_[bin];
      const Time room = kBin - b.used;
      if (left < room) {
        b.used += static_cast<uint32_t>(left);
        return std::max(bin * kBin + b.used, from + work);
      }
      left -= room;
      b.used = kBin;
      b.next = static_cast<uint32_t>(bin + 1);
      bin = find(bin + 1);
    }
  }
  Time busy() const { return busy_; }
  void clear() {
    bins_.clear();
    busy_ = 0;
  }

 private:
  static constexpr Time kBin = 1u << 20;   // ps: about a microsecond
  struct Bin {
    uint32_t used;   // ps
    uint32_t next;   // itself; once full, a bin behind it
  };
  // The first bin from `bin` on that has room.
  uint64_t find(uint64_t bin) {
    grow(bin);
    while (bins_[bin].next != bin) {
      const uint32_t after = bins_[bin].next;
      grow(after);
      bins_[bin].next = bins_[after].next;   // every visit halves the way for the next one
      bin = after;
    }
    return bin;
  }
  void grow(uint64_t bin) {
    while (bins_.size() <= bin) bins_.push_back({0, static_cast<uint32_t>(bins_.size())});
  }
  std::vector<Bin> bins_;
  Time busy_ = 0;
};

}  // namespace moecomm
