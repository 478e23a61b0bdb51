// UcxRail: the rail between processes. It joins the puts and signals of a region with the progress of its
// context.
#pragma once
#include "exec/lane.hpp"
#include "fabric/cpu/host.hpp"
#include "fabric/cpu/ucx.hpp"

namespace moecomm {

class UcxRail {
 public:
  static constexpr bool kNetwork = true;

  void attach(UcxContext* context, UcxRegion* region) {
    context_ = context;
    region_ = region;
  }
  void put(int peer, uint64_t offset, const void* src, uint64_t bytes) noexcept {
    region_->put(peer, offset, src, bytes);
  }
  void get(int peer, void* to, uint64_t offset, uint64_t bytes) noexcept {
    region_->get(peer, to, offset, bytes);
  }
  void signal(int peer, uint64_t counter, uint64_t add) noexcept { region_->signal(peer, counter, add); }
  char* reach(int peer) const noexcept { return region_->reach(peer); }
  bool progress() noexcept { return context_->progress(); }
  int lost(int rank) const noexcept { return context_->lost(rank); }
  bool flush_poll() noexcept { return region_->flush_poll(); }
  bool drained() noexcept { return region_->drained(); }

 private:
  UcxContext* context_ = nullptr;
  UcxRegion* region_ = nullptr;
};
static_assert(Fabric<HostFabric<UcxRail>, Lane>);

}  // namespace moecomm
