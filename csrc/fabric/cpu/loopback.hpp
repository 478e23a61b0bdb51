// LoopbackRail: the rail between ranks in one address space. A put is a copy, a signal an atomic addition.
#pragma once
#include <cstring>
#include <vector>

#include "exec/lane.hpp"
#include "fabric/cpu/host.hpp"

namespace moecomm {

class LoopbackRail {
 public:
  static constexpr bool kNetwork = false;

  void attach(std::vector<char*> regions) { regions_ = std::move(regions); }  // by peer
  void put(int peer, uint64_t offset, const void* src, uint64_t bytes) noexcept {
    std::memcpy(regions_[peer] + offset, src, bytes);
  }
  void get(int peer, void* to, uint64_t offset, uint64_t bytes) noexcept {
    std::memcpy(to, regions_[peer] + offset, bytes);
  }
  void signal(int peer, uint64_t counter, uint64_t add) noexcept {
    add_and_wake(regions_[peer], counter, add);
  }
  // Null as over a network, so that rank threads run the same code.
  static char* reach(int) noexcept { return nullptr; }
  static bool progress() noexcept { return false; }
  static int lost(int) noexcept { return -1; }
  static bool flush_poll() noexcept { return true; }
  static bool drained() noexcept { return true; }

 private:
  std::vector<char*> regions_;
};
static_assert(Fabric<HostFabric<LoopbackRail>, Lane>);

}  // namespace moecomm
