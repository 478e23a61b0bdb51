// Injected faults, for tests: when a rank passes a point of a call for the n-th time, a row is damaged or
// omitted, or the process is stopped or killed. Buffer::set_fault arms a fault. Without one, an operation
// costs one comparison more.
#pragma once
#include <csignal>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/types.hpp"

namespace moecomm {

struct Fault {
  enum class Point : int32_t { none = 0, put = 1, copy = 2, reduce = 3, wait = 4 };
  enum class Action : int32_t { damage = 0, omit = 1, stop = 2, kill = 3 };
  Point point = Point::none;
  Action action = Action::damage;
  Phase phase = Phase::none;  // of a wait
  int64_t passes = 0;         // how often the point is passed before the fault strikes
  std::vector<char> damaged;  // the source of a damaged put must outlive it

  // True if the fault applies to this operation. `stop` and `kill` act here.
  bool strikes(Point p, Phase in = Phase::none) {
    if (p != point || (p == Point::wait && in != phase) || passes-- != 0) return false;
    point = Point::none;
    if (action == Action::stop) raise(SIGSTOP);
    if (action == Action::kill) raise(SIGKILL);
    return action <= Action::omit;
  }
  const char* damage(const char* src, uint64_t bytes) {
    damaged.assign(src, src + bytes);
    damaged[bytes / 2] ^= 1;
    return damaged.data();
  }
};

}  // namespace moecomm
