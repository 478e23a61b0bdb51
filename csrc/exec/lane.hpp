// The CPU's group: one lane. Synchronization costs nothing.
#pragma once
#include "exec/group.hpp"

namespace moecomm {

struct Lane {
  static constexpr int lane() { return 0; }
  static constexpr int size() { return 1; }
  static constexpr void sync() {}
  template <class T>
  static constexpr T broadcast(T v, int) {
    return v;
  }
};
static_assert(Group<Lane>);

}  // namespace moecomm
