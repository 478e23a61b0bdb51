// DeviceFabric: the Fabric of the cuda world. Node windows are peer-mapped device memory; the rail is a type
// parameter (loopback between ranks that map each other's memory, NCCL's GIN between hosts).
//
// Ordering. Lane 0 sends a signal: it waits for the group's bulk copies, orders the engine's proxy with its
// own, and adds with release at system scope. The group's sync orders the stores of other lanes before it. A
// wait polls with relaxed loads, then acquires once at system scope. A proxy fence follows, so that the
// engine may also read the released data.
#pragma once
#include "base/wire.hpp"
#include "exec/warp.cuh"
#include "fabric/cuda/links.hpp"
#include "fabric/cuda/reduce.cuh"
#include "fabric/cuda/scratch.cuh"
#include "fabric/cuda/squad.cuh"
#include "fabric/fabric.hpp"

namespace moecomm {

// Whether addresses and size of a copy are multiples of 16 bytes.
__device__ inline bool in_sixteens(const char* dst, const char* src, uint64_t bytes) {
  return ((address_of(dst) | address_of(src) | bytes) & 15) == 0;
}
__device__ inline void copy_word(char* dst, const char* src) {
  *as<uint32_t>(dst) = *as<const volatile uint32_t>(src);
}

// A rail has these functions:
//   of(links, stream)   Puts and signals of one stream to one peer are ordered. Each group of a call is a
//                       stream; if several groups put and one of them signals for all, they share a stream.
//   put, signal, fault  Lane 0, after its bulk copies.
//   get                 Lane 0. The bytes have arrived after flush.
//   flush               Lane 0, at the end of a call: waits until the sources of this warp's puts have been
//                       read.
//
// LoopbackDeviceRail: the rail between ranks that map each other's regions. A put is a copy by the engine, a
// signal a release at system scope.
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
    } else {  // checksums, returned values and fault words: whole words
      for (uint64_t i = 0; i < bytes; i += 4) copy_word(dst + i, src + i);
    }
  }
  __device__ void get(WarpScratch&, int peer, char* to, uint64_t offset, uint64_t bytes) const {
    const char* from = regions[peer] + offset;
    for (uint64_t i = 0; i < bytes; ++i) to[i] = *Offset<volatile char>{i}.in(from);
  }
  __device__ void signal(WarpScratch&, int peer, uint64_t counter, uint64_t add) const {
    ptx::add_release_sys(CounterAt{counter}.in(regions[peer]), add);
  }
  __device__ void fault(WarpScratch&, int peer, uint64_t offset, uint64_t word) const {
    if (!regions[peer]) return;  // a rank of this node, if the peers of the rail are all ranks
    ptx::store_release_sys(CounterAt{offset}.in(regions[peer]), word);
  }
  static __device__ Status flush(WarpScratch&, uint64_t) { return {}; }
};

// Rows of at least this size are copied by the copy engine.
constexpr uint64_t kBulkBytes = 1024;
constexpr int kPollsPerCheck = 64;
// A group that still waits when its call has run for this long announces the call to the other ranks.
constexpr uint64_t kTellAfter = 1'000'000;  // ns

template <class Rail>
concept DeviceRail = requires(Rail rail, WarpScratch& scratch, const DeviceLinks& links, const char* source) {
  { Rail::of(links, 0) } -> std::same_as<Rail>;
  rail.put(scratch, 0, uint64_t{}, source, uint64_t{});
  rail.signal(scratch, 0, uint64_t{}, uint64_t{});
  rail.fault(scratch, 0, uint64_t{}, uint64_t{});
  { rail.flush(scratch, uint64_t{}) } -> std::same_as<Status>;
  { Rail::kPutsFromAnywhere } -> std::convertible_to<bool>;
};

// Whether a rank is masked, so that nothing may be written into its memory.
__device__ inline bool is_masked(const DeviceLinks& board, int rank) {
  return ptx::load_relaxed_sys(&board.call_words.in(board.rail_region)[rank].packed) == kMaskedWord;
}

// One lane writes a word to this rank's place on the board of every other rank. This function and the next
// two are not inlined, because decode's kernels have no free registers.
template <DeviceRail Rail>
__device__ __attribute__((noinline)) void post(const DeviceLinks& links, WarpScratch& scratch,
                                               Offset<FaultWord> words, uint64_t word) {
  const DeviceLinks& board = *links.board;
  const Geometry& g = board.geometry;
  const Offset<FaultWord> at = words + g.rank;
  for (int d = 0; d < g.ranks_per_node; ++d)
    if (d != g.local() && !is_masked(board, g.rank_at(g.node(), d)))
      ptx::store_release_sys(&at.in(board.windows[d])->packed, word);
  const Rail far = Rail::of(board, 0);
  for (int r = 0; r < g.size; ++r)
    if (r / g.ranks_per_node != g.node() && !is_masked(board, r)) far.fault(scratch, r, at.value, word);
}

// One lane writes a final failure to every rank within reach: into the memory of this call, and on the board,
// because others may wait in another call.
template <DeviceRail Rail>
__device__ __attribute__((noinline)) void report(const DeviceLinks& links, WarpScratch& scratch,
                                                 uint64_t word) {
  const Geometry& g = links.geometry;
  const auto reaches = [&](int rank) { return !links.board || !is_masked(*links.board, rank); };
  for (int d = 0; d < g.ranks_per_node; ++d)
    if (d != g.local() && reaches(g.rank_at(g.node(), d)))
      ptx::store_release_sys(&(links.window_faults + g.local()).in(links.windows[d])->packed, word);
  const Rail rail = Rail::of(links, 0);  // the caller's, as an argument, would be in local memory
  const bool peers_are_nodes = links.region_peers < g.size;
  for (int p = 0; p < links.region_peers; ++p)
    if (p != links.own_peer && reaches(peers_are_nodes ? g.rail_rank(p) : p))
      rail.fault(scratch, p, (links.region_faults + links.own_peer).value, word);
  if (links.board) post<Rail>(links, scratch, links.board->window_faults, word);
}

// One waiting lane checks the board. Returns, as a FaultWord, a failure that another rank has reported, or
// that another rank waits in another call; 0: neither. The loads are relaxed, because no other data belongs
// to a word.
template <DeviceRail Rail>
__device__ __attribute__((noinline)) uint64_t look_at_board(const DeviceLinks& links, WarpScratch& scratch) {
  const DeviceLinks& board = *links.board;
  const int size = board.geometry.size;
  const FaultWord* faults = board.window_faults.in(board.rail_region);
  for (int r = 0; r < size; ++r)
    if (const uint64_t word = ptx::load_relaxed_sys(&faults[r].packed)) return word;
  const uint64_t own = scratch.call_word;
  if (own == 0 || ptx::nanoseconds() < scratch.tell_at) return 0;
  CallClock& clock = *links.clock;
  if (const auto told = atomicAdd(&clock.told, 0ull);  // once for all groups
      told != own && atomicCAS(&clock.told, told, own) == told)
    post<Rail>(links, scratch, board.call_words, own);
  const FaultWord* calls = board.call_words.in(board.rail_region);
  for (int r = 0; r < size; ++r)
    if (const uint64_t theirs = ptx::load_relaxed_sys(&calls[r].packed); waits_elsewhere(own, theirs))
      return pack_fault(other_call(own, theirs, r, Phase::none), -1).packed;
  return 0;
}

// One lane, whose wait for `peer` has come to the deadline: the rank that it names. A peer that waits in the
// same call waits for another rank. That is the one which has not told that it waits there, if only one has
// not.
__device__ __attribute__((noinline)) inline int suspect(const DeviceLinks& links, const WarpScratch& scratch,
                                                        int peer) {
  const DeviceLinks& board = *links.board;
  const FaultWord* calls = board.call_words.in(board.rail_region);
  const auto waits = [&](int r) {
    const uint64_t word = ptx::load_relaxed_sys(&calls[r].packed);
    return word == scratch.call_word || word == kMaskedWord;
  };
  if (scratch.call_word == 0 || peer < 0 || !waits(peer)) return peer;
  int found = -1;
  for (int r = 0; r < board.geometry.size; ++r) {
    if (r == board.geometry.rank || waits(r)) continue;
    if (found >= 0) return peer;
    found = r;
  }
  return found < 0 ? peer : found;
}

template <DeviceRail Rail>
struct DeviceFabric {
  static constexpr bool kPutsFromAnywhere = Rail::kPutsFromAnywhere;
  const DeviceLinks* links;
  Rail rail_link;
  WarpScratch* scratch;

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

  template <Group G>
  __device__ void copy_row(G g, char* dst, const char* src, uint64_t bytes) const {
    if (takes_engine(dst, src, bytes)) return bulk(g, src, bytes, 1, [&](int) { return dst; });
    copy_words(g, dst, src, bytes);
  }
  template <Group G>
  __device__ void spread_row(G g, char* const* targets, int count, const char* src, uint64_t bytes) const {
    if (takes_engine(src, src, bytes))
      return bulk(g, src, bytes, count, [&](int i) { return targets[i]; });  // targets are rows of windows
    for (int i = 0; i < count; ++i) copy_words(g, targets[i], src, bytes);
  }
  template <Group G>
  __device__ void zero_row(G g, char* dst, uint64_t bytes) const {
    if (in_sixteens(dst, dst, bytes))
      for (uint64_t i = 16 * g.lane(); i < bytes; i += 16 * g.size()) ptx::store16(dst + i, uint4{});
    else
      for (uint64_t i = 4 * g.lane(); i < bytes; i += 4 * g.size()) *Offset<uint32_t>{i}.in(dst) = 0;
  }
  template <Group G>
  __device__ void finish_rows(G g) const {
    if (g.lane() == 0) complete();
    g.sync();
  }

  // Rows come from peers by the engine or by stores; a sum is written by stores.
  template <Group G>
  __device__ void reduce_rows(G g, char* dst, const Terms& terms, const Terms*, const float* bias,
                              int64_t hidden, DType type) const {
    with_element(type, [&](auto element) {
      using T = decltype(element);
      if constexpr (T::kBytes < 8)
        if (terms.coded) return reduce_coded<T>(dst, terms, bias, hidden, g.lane(), g.size());
      reduce_plain<T>(dst, terms, bias, hidden, g.lane(), g.size());
    });
  }
  template <Group G>
  __device__ void reduce_encode(G g, char* dst, Wire wire, const Terms& terms, const Terms*, int64_t hidden,
                                DType type) const {
    with_element(type, [&](auto element) {
      using T = decltype(element);
      if constexpr (T::kBytes < 8) reduce_wire<T>(dst, wire, terms, hidden, g.lane(), g.size());
    });
  }
  template <Group G>
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

  // Writes the first failure of each kind to the rank's record. After a verdict or a refusal each rank
  // completes the call. A final failure ends all warps of this rank and is reported to all peers within
  // reach, even if the call has been refused.
  __device__ void fail(const Status& s) const {
    if (s.code == Code::lost && s.peer == links->geometry.rank) return;  // ended by another warp's failure
    const int fatal = is_final(s);
    const bool first = takes_record(links, fatal);
    if (first)
      write(links->own && s.code == Code::invalid && keeps_step(s) ? *links->own : *links->faults[fatal], s);
    if (keeps_step(s)) return;
    ptx::add_release_gpu(links->failed, 1);  // also where the record is that of an earlier call in a graph
    if (!first || s.code == Code::invalid) return;  // invalid: nothing has moved
    report<Rail>(*links, *scratch, pack_fault(s, links->geometry.rank).packed);
  }
  // One lane: this rank's own argument is wrong, in a call that no host waits for. This is written before any
  // peer is told. So a host that finds a record of what followed also finds this one.
  __device__ void note(int32_t bad, uint64_t token, uint64_t id) const {
    note_own(links, bad, token, id);  // a call with `this` would put the fabric into local memory
  }
  // One lane, at the end of a call: waits until the network has read the sources of this warp's puts.
  __device__ Status flush() const { return rail_link.flush(*scratch, scratch->deadline); }
  __device__ bool failed() const { return ptx::load_relaxed_gpu(links->failed) != 0; }

  // One lane: waits for the group's bulk copies and orders them before its next operations.
  __device__ void complete() const {
    ptx::bulk_wait_all();
    ptx::proxy_fence();
  }

 private:
  // Whether this warp is the first to fill a record in this call: 0, of what keeps the step; 1, of a final
  // failure.
  __device__ static bool takes_record(const DeviceLinks* links, int fatal) {
    return atomicCAS(reinterpret_cast<unsigned long long*>(links->failed + 1 + fatal), 0ull, 1ull) == 0;
  }
  __device__ __attribute__((noinline)) static void note_own(const DeviceLinks* links, int32_t bad,
                                                            uint64_t token, uint64_t id) {
    if (links->own && takes_record(links, 0))
      write(*links->own, {Code::invalid, Phase::none, -1, bad, token, id});
  }
  // If the record of an earlier call is still there, the host may be reading it.
  __device__ static void write(FaultRecord& record, const Status& s) {
    if (ptx::load_acquire_sys(&record.code) != 0) return;
    record.status = s;
    ptx::store_release_sys(&record.code, static_cast<uint64_t>(s.code));
  }
  // The engine copies multiples of 16 bytes. Rows are such multiples; scales of long rows may not be.
  __device__ static bool takes_engine(const char* dst, const char* src, uint64_t bytes) {
    return ptx::kBulk && bytes >= kBulkBytes && in_sixteens(dst, src, bytes);
  }
  template <Group G, class Target>
  __device__ void bulk(G g, const char* src, uint64_t bytes, int count, Target&& target) const {
    g.sync();
    if (g.lane() == 0) {
      ptx::proxy_fence();  // what the lanes stored before the sync may be the source
      scratch->pipe.copy(src, bytes, count, target);
    }
    g.sync();
  }
  template <Group G>
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
        if (const uint64_t w = ptx::load_relaxed_sys(&words[i].packed)) return w;
      return uint64_t{0};
    };
    uint64_t word =
        read(window(links->geometry.local(), links->window_faults), links->geometry.ranks_per_node);
    if (!word && links->rail_region) word = read(rail(links->region_faults), links->region_peers);
    if (!word && links->board) word = look_at_board<Rail>(*links, *scratch);
    if (!word && failed())
      return {Code::lost, phase, links->geometry.rank, 1, 0, 0};  // another warp has left the record
    if (!word) return {};
    Status reported = unpack_fault({word});
    reported.phase = phase;
    return reported;
  }
  __device__ Status wait(const uint64_t* c, uint64_t at_least, Phase phase, int peer) const {
    Status s;
    uint64_t got;
    for (int polls = 1; (got = ptx::load_relaxed_sys(c)) < at_least; ++polls) {
      if (polls % kPollsPerCheck) continue;
      s = reported_fault(phase);
      if (s.ok() && ptx::nanoseconds() >= scratch->deadline)
        s = {Code::timeout, phase, links->board ? suspect(*links, *scratch, peer) : peer, 0, at_least, got};
      if (s.ok()) continue;
      if (ptx::load_relaxed_sys(c) < at_least) return s;  // arrived data takes precedence over a failure
      break;
    }
    ptx::load_acquire_sys(c);
    ptx::proxy_fence();
    return {};
  }
};
static_assert(Fabric<DeviceFabric<LoopbackDeviceRail>, Warp> &&
              Fabric<DeviceFabric<LoopbackDeviceRail>, Squad>);

}  // namespace moecomm
