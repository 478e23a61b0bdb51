// DeviceFabric: the Fabric of the cuda world. Node windows are peer-mapped device memory; the rail is a type
// parameter (loopback between ranks that map each other's memory, NCCL's GIN between hosts).
//
// Ordering. A signal is lane 0's: it waits for the group's bulk copies, orders the engine's proxy with its
// own, and adds with release at system scope; what other lanes stored comes before it by the group's sync. A
// wait is an acquire at system scope followed by a proxy fence, so that the engine too may read what was
// released.
#pragma once
#include "base/wire.hpp"
#include "exec/warp.cuh"
#include "fabric/cuda/links.hpp"
#include "fabric/cuda/reduce.cuh"
#include "fabric/cuda/scratch.cuh"
#include "fabric/cuda/squad.cuh"
#include "fabric/fabric.hpp"

namespace moecomm {

// Whether a copy is made of whole 16 bytes.
__device__ inline bool in_sixteens(const char* dst, const char* src, uint64_t bytes) {
  return ((reinterpret_cast<uint64_t>(dst) | reinterpret_cast<uint64_t>(src) | bytes) & 15) == 0;
}
__device__ inline void copy_word(char* dst, const char* src) {
  *reinterpret_cast<uint32_t*>(dst) = *reinterpret_cast<const volatile uint32_t*>(src);
}

// A rail
//   of(links, stream)   puts and signals of one stream to one peer are in order; a call's seat is its stream,
//   but where
//                       groups put and one of them signals for all, they use one stream
//   put, signal, fault  lane 0, after its bulk copies
//   flush               lane 0, at the end of a call: the sources of this warp's puts have been read
//
// Between ranks whose regions are mapped here: a put is a copy through the engine, a signal a release at
// system scope.
struct LoopbackDeviceRail {
  static constexpr bool kPutsFromAnywhere = true;
  char** regions;

  static __device__ LoopbackDeviceRail of(const DeviceLinks& links, int) { return {links.regions}; }

  __device__ void put(WarpScratch& scratch, int peer, uint64_t offset, const char* src,
                      uint64_t bytes) const {
    char* dst = regions[peer] + offset;
    const bool whole = in_sixteens(dst, src, bytes);
    if (ptx::kBulk && whole) {
      scratch.pipe.copy(src, bytes, 1, [&](int) { return dst; });
    } else if (whole) {
      for (uint64_t i = 0; i < bytes; i += 16) ptx::store16(dst + i, ptx::load16(src + i));
    } else {  // checksums, slots and fault words: whole words
      for (uint64_t i = 0; i < bytes; i += 4) copy_word(dst + i, src + i);
    }
  }
  __device__ void signal(WarpScratch&, int peer, uint64_t counter, uint64_t add) const {
    ptx::add_release_sys(CounterAt{counter}.in(regions[peer]), add);
  }
  __device__ void fault(WarpScratch&, int peer, uint64_t offset, uint64_t word) const {
    if (!regions[peer]) return;  // a rank of this node, where the rail has one peer per rank of the world
    ptx::store_release_sys(CounterAt{offset}.in(regions[peer]), word);
  }
  static __device__ Status flush(WarpScratch&, uint64_t) { return {}; }
};

// Rows from this size on go through the copy engine.
constexpr uint64_t kBulkBytes = 1024;
constexpr int kPollsPerCheck = 64;

template <class Rail>
concept DeviceRail = requires(Rail rail, WarpScratch& scratch, const DeviceLinks& links, const char* source) {
  { Rail::of(links, 0) } -> std::same_as<Rail>;
  rail.put(scratch, 0, uint64_t{}, source, uint64_t{});
  rail.signal(scratch, 0, uint64_t{}, uint64_t{});
  rail.fault(scratch, 0, uint64_t{}, uint64_t{});
  { rail.flush(scratch, uint64_t{}) } -> std::same_as<Status>;
  { Rail::kPutsFromAnywhere } -> std::convertible_to<bool>;
};

template <DeviceRail Rail>
struct DeviceFabric {
  static constexpr bool kPutsFromAnywhere = Rail::kPutsFromAnywhere;
  const DeviceLinks* links;
  Rail rail_link;
  WarpScratch* scratch;
  uint64_t deadline;  // %globaltimer

  __device__ char* window(int local) const { return links->windows[local]; }
  template <class T>
  __device__ T* window(int local, Offset<T> at) const {
    return at.in(links->windows[local]);
  }
  template <class T>
  __device__ T* rail(Offset<T> at) const {
    return at.in(links->rail_region);
  }

  __device__ void put(int peer, uint64_t offset, const char* src, uint64_t bytes) const {
    complete();  // the source may have been written by this group's row operations
    rail_link.put(*scratch, peer, offset, src, bytes);
  }
  __device__ void signal_rail(int peer, CounterAt counter, uint64_t add) const {
    complete();
    rail_link.signal(*scratch, peer, counter.value, add);
  }
  __device__ void signal_node(int local, CounterAt counter, uint64_t add) const {
    complete();
    ptx::add_release_sys(window(local, counter), add);
  }
  __device__ Status wait_rail(CounterAt counter, uint64_t at_least, Phase phase, int peer) const {
    return wait(rail(counter), at_least, phase, peer);
  }
  __device__ Status wait_node(CounterAt counter, uint64_t at_least, Phase phase, int peer) const {
    return wait(window(links->geometry.local(), counter), at_least, phase, peer);
  }

  template <class G>
  __device__ void copy_row(G g, char* dst, const char* src, uint64_t bytes) const {
    if (takes_engine(dst, src, bytes)) return bulk(g, src, bytes, 1, [&](int) { return dst; });
    copy_words(g, dst, src, bytes);
  }
  template <class G>
  __device__ void spread_row(G g, char* const* targets, int count, const char* src, uint64_t bytes) const {
    if (takes_engine(src, src, bytes))
      return bulk(g, src, bytes, count, [&](int i) { return targets[i]; });  // targets are rows of windows
    for (int i = 0; i < count; ++i) copy_words(g, targets[i], src, bytes);
  }
  template <class G>
  __device__ void zero_row(G g, char* dst, uint64_t bytes) const {
    if (in_sixteens(dst, dst, bytes))
      for (uint64_t i = 16 * g.lane(); i < bytes; i += 16 * g.size()) ptx::store16(dst + i, uint4{});
    else
      for (uint64_t i = 4 * g.lane(); i < bytes; i += 4 * g.size()) *Offset<uint32_t>{i}.in(dst) = 0;
  }
  template <class G>
  __device__ void settle(G g) const {
    if (g.lane() == 0) complete();
    g.sync();
  }

  // Rows come from peers by the engine or by stores; a sum is written by stores.
  template <class G>
  __device__ void reduce_rows(G g, char* dst, const Terms& terms, const Terms*, const float* bias,
                              int64_t hidden, DType type) const {
    with_element(type, [&](auto element) {
      using T = decltype(element);
      if constexpr (T::kBytes < 8)
        if (terms.coded) return reduce_coded<T>(dst, terms, bias, hidden, g.lane(), g.size());
      reduce_plain<T>(dst, terms, bias, hidden, g.lane(), g.size());
    });
  }
  template <class G>
  __device__ void reduce_encode(G g, char* dst, Wire wire, const Terms& terms, const Terms*, int64_t hidden,
                                DType type) const {
    with_element(type, [&](auto element) {
      using T = decltype(element);
      if constexpr (T::kBytes < 8) reduce_wire<T>(dst, wire, terms, hidden, g.lane(), g.size());
    });
  }
  template <class G>
  __device__ void quantize_row(G g, char* codes, char* scales, const char* row, int64_t hidden, DType type,
                               ScaleKind kind) const {
    with_element(type, [&](auto element) {
      using T = decltype(element);
      if constexpr (T::kBytes < 8) quantize<T>(codes, scales, row, hidden, kind, g.lane(), g.size());
    });
  }

  __device__ Counters& counters() const { return scratch->counters; }
  __device__ TermStore& terms(int which) const { return scratch->terms[which]; }
  __device__ char** targets() const { return scratch->targets; }
  __device__ bool replicates(int local) const { return links->same_device[local / 64] >> local % 64 & 1; }

  // The first failure of a kind is a rank's record of it. With a verdict or a refusal each rank goes on to
  // the call's end; what is final ends all warps of this rank, and everyone within reach learns of it,
  // whatever the call was refused for.
  __device__ void fail(const Status& s) const {
    if (s.code == Code::lost && s.peer == links->geometry.rank) return;  // ended by another warp's failure
    const int fatal = is_final(s);
    if (atomicCAS(reinterpret_cast<unsigned long long*>(links->failed + 1 + fatal), 0ull, 1ull) != 0) return;
    FaultRecord& record = links->faults[fatal];
    if (ptx::load_acquire_sys(&record.code) ==
        0) {  // else that of an earlier call is there, and the host may be reading it
      record.status = s;
      ptx::store_release_sys(&record.code, static_cast<uint64_t>(s.code));
    }
    if (keeps_step(s)) return;
    ptx::add_release_gpu(links->failed, 1);
    if (s.code == Code::invalid) return;  // nothing has moved
    const Geometry& g = links->geometry;
    const uint64_t word = pack_fault(s, g.rank).packed;
    for (int d = 0; d < g.ranks_per_node; ++d)
      if (d != g.local()) ptx::store_release_sys(&window(d, links->window_faults + g.local())->packed, word);
    for (int p = 0; p < links->region_peers; ++p)
      if (p != links->own_peer)
        rail_link.fault(*scratch, p, (links->region_faults + links->own_peer).value, word);
  }
  // One lane, at the end of a call: the network has read the sources of this warp's puts.
  __device__ Status flush() const { return rail_link.flush(*scratch, deadline); }
  __device__ bool failed() const { return ptx::load_acquire_gpu(links->failed) != 0; }

  // One lane: the group's bulk copies are done and in order before what it does next.
  __device__ void complete() const {
    ptx::bulk_wait_all();
    ptx::proxy_fence();
  }

 private:
  // The engine takes whole 16 bytes; rows are, scales of long rows need not be.
  __device__ static bool takes_engine(const char* dst, const char* src, uint64_t bytes) {
    return ptx::kBulk && bytes >= kBulkBytes && in_sixteens(dst, src, bytes);
  }
  template <class G, class Target>
  __device__ void bulk(G g, const char* src, uint64_t bytes, int count, Target&& target) const {
    g.sync();
    if (g.lane() == 0) {
      ptx::proxy_fence();  // what the lanes stored before the sync may be the source
      scratch->pipe.copy(src, bytes, count, target);
    }
    g.sync();
  }
  template <class G>
  __device__ static void copy_words(G g, char* dst, const char* src, uint64_t bytes) {
    if (in_sixteens(dst, src, bytes))
      for (uint64_t i = 16 * g.lane(); i < bytes; i += 16 * g.size())
        ptx::store16(dst + i, ptx::load16(src + i));
    else
      for (uint64_t i = 4 * g.lane(); i < bytes; i += 4 * g.size()) copy_word(dst + i, src + i);
  }
  __device__ Status reported_fault(Phase phase) const {
    const auto read = [&](const FaultWord* words, int count) {
      for (int i = 0; i < count; ++i)
        if (const uint64_t w = ptx::load_acquire_sys(&words[i].packed)) return w;
      return uint64_t{0};
    };
    uint64_t word =
        read(window(links->geometry.local(), links->window_faults), links->geometry.ranks_per_node);
    if (!word && links->rail_region) word = read(rail(links->region_faults), links->region_peers);
    if (!word && failed())
      return {Code::lost, phase, links->geometry.rank, 1, 0, 0};  // another warp has left the record
    if (!word) return {};
    Status told = unpack_fault({word});
    told.phase = phase;
    return told;
  }
  __device__ Status wait(const uint64_t* c, uint64_t at_least, Phase phase, int peer) const {
    Status s;
    uint64_t got;
    for (int polls = 1; (got = ptx::load_acquire_sys(c)) < at_least; ++polls) {
      if (polls % kPollsPerCheck) continue;
      s = reported_fault(phase);
      if (s.ok() && ptx::nanoseconds() >= deadline) s = {Code::timeout, phase, peer, 0, at_least, got};
      if (s.ok()) continue;
      if (ptx::load_acquire_sys(c) < at_least) return s;  // arrived data wins over a fault
      break;
    }
    ptx::proxy_fence();
    return {};
  }
};
static_assert(Fabric<DeviceFabric<LoopbackDeviceRail>, Warp> &&
              Fabric<DeviceFabric<LoopbackDeviceRail>, Squad>);

}  // namespace moecomm
