// A group's own piece of shared memory: lists, counters, and the stages of its copy pipeline.
#pragma once
#include "base/counters.hpp"
#include "base/offset.hpp"
#include "base/terms.hpp"
#include "fabric/cuda/ptx.cuh"

namespace moecomm {

// Rows pass through in pieces of a stage; with several stages the loads of one piece overlap the stores of
// others.
constexpr int kStages = 3;  // unless a call says otherwise
constexpr int kMaxStages = 4;

// The stages of a warp's pipeline and which of them comes next. Lane 0's alone.
struct Pipeline {
  uint64_t barrier[kMaxStages];
  char* stages;
  uint32_t stage_bytes;
  int32_t count;  // of stages, at least 2
  int32_t next;
  uint32_t parity;  // bit i: phase of stage i

  // src to every target, in pieces. On return src has been read; the stores may be under way.
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
        // This stage's stores are older than the newest group: all but that one have read their stages.
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
  uint32_t words[16];             // of a Squad's broadcasts
  bool unflushed;                 // a put of this warp may still be read by its network
  bool late;                      // the rank had failed when the group began
  alignas(64) char request[128];  // where such a rail builds its requests

  // A group's piece of shared memory, made ready; once per kernel, by all lanes. `failed`: as DeviceLinks';
  // one lane looks for all.
  template <class G>
  static __device__ WarpScratch* open(G g, char* shared, uint32_t stage_bytes, int stages = kStages,
                                      const uint64_t* failed = nullptr) {
    WarpScratch* scratch = Offset<WarpScratch>{}.in(shared);
    if (g.lane() == 0) {
      scratch->counters = {};
      scratch->unflushed = false;
      scratch->late = failed && ptx::load_acquire_gpu(failed) != 0;
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

static_assert(sizeof(WarpScratch) <= 2304);  // moecomm.tuning counts on it

MOE_HD constexpr uint32_t warp_shared_bytes(uint32_t stage_bytes, int stages = kStages) {
  return sizeof(WarpScratch) + stages * stage_bytes;
}

}  // namespace moecomm
