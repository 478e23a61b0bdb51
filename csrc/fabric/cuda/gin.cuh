// GinRail: the rail between hosts, over NCCL's GPU-initiated network.
//
// Counters. A signal adds to a 64-bit word of the peer's window ("VA signal"), so every counter of
// base/layout.hpp stays where it is: it only grows, has one writer, and is awaited as on any rail, by an
// acquire load of this rank's memory. NCCL's numbered signals are not used: they are elsewhere, and would
// need a table from counters to numbers.
//
// Ordering. GIN orders per context and peer: a *strong* signal becomes visible after all puts that were
// posted before it to that peer on its context; a weak one orders only the put that it comes with. Hence
// streams: a stream always uses the same context, whichever group posts. Puts of one group and its signals
// share a stream. If several groups put and one of them signals for all (decode), they also share a stream,
// and a latch or barrier comes before the signal: put() returns when the request is posted, so the signal is
// posted behind all of them. This needs no flush.
//
// Sources. The source of a put must not change until the network has read it. flush() at the end of a call
// waits for that, so the next call may overwrite its staging memory.
#pragma once
#include "fabric/cuda/device.cuh"
#include "fabric/cuda/gin.hpp"
#include "fabric/cuda/links.hpp"
#include "fabric/cuda/scratch.cuh"

namespace moecomm {

struct GinRail {
  static constexpr bool kPutsFromAnywhere = false;
  const DeviceLinks* links;
  int stream;

  static __device__ GinRail of(const DeviceLinks& links, int stream) { return {&links, stream}; }

  // Not inlined: with its registers beside those of a sum, decode's combine would spill.
  __device__ __attribute__((noinline)) void put(WarpScratch& scratch, int peer, uint64_t offset,
                                                const char* src, uint64_t bytes) const {
    const uint64_t from =
        src - (links->rail_region - links->region_offset);  // sources are in this rank's window
    context().put(network().peers, peer, network().window, there(offset), network().window, from, bytes,
                  ncclGin_None{}, ncclGin_None{}, ncclCoopThread{}, descriptor(scratch));
    scratch.unflushed = true;
  }
  // `to` must be in this rank's window.
  __device__ void get(WarpScratch& scratch, int peer, char* to, uint64_t offset, uint64_t bytes) const {
    const uint64_t here = to - (links->rail_region - links->region_offset);
    context().get(network().peers, peer, network().window, there(offset), network().window, here, bytes,
                  ncclCoopThread{}, descriptor(scratch));
    scratch.unflushed = true;
  }
  __device__ void signal(WarpScratch& scratch, int peer, uint64_t counter, uint64_t add) const {
    context().signal(network().peers, peer, ncclGin_StrongVASignalAdd{network().window, there(counter), add},
                     ncclCoopThread{}, descriptor(scratch));
  }
  __device__ void fault(WarpScratch& scratch, int peer, uint64_t offset, uint64_t word) const {
    context().putValue(network().peers, peer, network().window, there(offset), word, ncclGin_None{},
                       ncclCoopThread{}, descriptor(scratch));
  }
  __device__ Status flush(WarpScratch& scratch, uint64_t deadline) const {
    if (!scratch.unflushed) return {};
    const uint64_t now = ptx::nanoseconds();
    const uint64_t cycles = now < deadline ? (deadline - now) * kCyclesPerNanosecond : 0;
    const bool done = context().flush(ncclCoopThread{}, ::cuda::memory_order_acquire, descriptor(scratch),
                                      cycles) == ncclSuccess;
    return done ? Status{} : Status{Code::timeout, Phase::flush, -1, 0, 0, 0};
  }

 private:
  static constexpr uint64_t kCyclesPerNanosecond = 2;  // at most: NCCL counts a deadline in cycles

  __device__ const GinNetwork& network() const { return *static_cast<const GinNetwork*>(links->network); }
  __device__ ncclGin context() const {
    return ncclGin(network().comm, static_cast<int>(stream % network().comm.ginContextCount));
  }
  __device__ uint64_t there(uint64_t offset) const { return links->region_offset + offset; }
  static __device__ ncclGin_DescriptorSmem descriptor(WarpScratch& scratch) {
    return {as<ncclGinDescriptorSmem>(scratch.request)};
  }
};
static_assert(Fabric<DeviceFabric<GinRail>, Warp> && Fabric<DeviceFabric<GinRail>, Squad>);

}  // namespace moecomm
