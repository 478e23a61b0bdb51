// A group's part of shared memory: lists, counters, and the stages of its copy pipeline.
#pragma once
#include "base/counters.hpp"
#include "base/offset.hpp"
#include "base/terms.hpp"
#include "exec/group.hpp"
#include "fabric/cuda/ptx.cuh"

namespace moecomm {

// Rows are copied in pieces of one stage. With several stages the load of one piece overlaps the stores of
// others.
constexpr int kStages = 3;  // the default
constexpr int kMaxStages = 4;
constexpr int kSquadStages = 8;  // the most, if several warps share a pipeline

// The stages of a warp's pipeline, and which of them is next. Only lane 0 uses it.
struct Pipeline {
  uint64_t barrier[kSquadStages];
  char* stages;
  uint32_t stage_bytes;
  int32_t count;  // of stages, at least 2
  int32_t next;
  uint32_t parity;  // bit i: phase of stage i

  // Copies src to every target, in pieces. On return src has been read; the stores may still be in flight.
  template <class Target>
  __device__ void copy(const char* src, uint64_t bytes, int targets, Target&& target) {
    const uint32_t piece = stage_bytes, pieces = static_cast<uint32_t>((bytes + piece - 1) / piece);
    const auto size_of = [&](uint32_t i) {
      return i + 1 < pieces ? piece : static_cast<uint32_t>(bytes - uint64_t{i} * piece);
    };
    const int all = count;
    const auto after = [all](int i) { return i + 1 == all ? 0 : i + 1; };
    int slot = next;
    for (uint32_t i = 0, loaded = 0; i < pieces; ++i) {
      for (; loaded < pieces && loaded < i + all - 1; ++loaded, slot = after(slot)) {
        // The stores of this stage are not in the newest group, so they have read the stage after this wait.
        ptx::bulk_wait_read<1>();
        ptx::bulk_load(stages + slot * piece, src + uint64_t{loaded} * piece, size_of(loaded),
                       &barrier[slot]);
      }
      const int now = next;
      ptx::barrier_wait(&barrier[now], parity >> now & 1);
      parity ^= 1u << now;
      next = after(now);
      for (int t = 0; t < targets; ++t)
        ptx::bulk_store(target(t) + uint64_t{i} * piece, stages + now * piece, size_of(i));
      ptx::bulk_commit();
    }
  }
};

struct alignas(128) WarpScratch {
  TermStore terms[2];
  char* targets[kMaxTopK];
  Counters counters;
  Pipeline pipe;
  uint32_t words[16];             // for broadcasts of a Squad
  bool unflushed;                 // the network may still read the source of a put of this warp
  bool late;                      // the rank had failed when the group began
  uint64_t deadline;              // of its waits, by %globaltimer
  uint64_t call_word;             // waiting_word() of the call; 0: it is not announced
  uint64_t tell_at;               // when to announce it, if this group still waits for another rank then
  uint64_t groups;                // number of groups of the call
  alignas(64) char request[128];  // where a network rail builds its requests

  // Initializes a group's part of shared memory. All lanes call it once per kernel. failed:
  // DeviceLinks::failed; one lane reads it for all.
  template <Group G>
  static __device__ WarpScratch* open(G g, char* shared, uint32_t stage_bytes, int stages = kStages,
                                      const uint64_t* failed = nullptr) {
    WarpScratch* scratch = Offset<WarpScratch>{}.in(shared);
    if (g.lane() == 0) {
      scratch->counters = {};
      scratch->unflushed = false;
      scratch->deadline = ~uint64_t{0};
      scratch->call_word = 0;
      scratch->late = failed && ptx::load_relaxed_gpu(failed) != 0;
      scratch->pipe.stages = shared + sizeof(WarpScratch);
      scratch->pipe.stage_bytes = stage_bytes;
      scratch->pipe.count = stages;
      scratch->pipe.next = 0;
      scratch->pipe.parity = 0;
      for (int i = 0; i < stages; ++i) ptx::barrier_init(&scratch->pipe.barrier[i]);
    }
    g.sync();
    return scratch;
  }
};

static_assert(sizeof(WarpScratch) <= 2304);  // moecomm.tuning relies on this

// The stages of a squad's one pipeline: as many as fit into the parts of its warps.
MOE_HD constexpr int squad_stages(int warps, uint32_t stage_bytes, int stages) {
  const int room = static_cast<int>((warps - 1) * (sizeof(WarpScratch) / stage_bytes + stages)) + stages;
  return warps == 1 || room < stages ? stages : room < kSquadStages ? room : kSquadStages;
}

MOE_HD constexpr uint32_t warp_shared_bytes(uint32_t stage_bytes, int stages = kStages) {
  return sizeof(WarpScratch) + stages * stage_bytes;
}

}  // namespace moecomm
