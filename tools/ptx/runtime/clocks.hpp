// What the checker of memory order keeps of lanes and accesses (checker.hpp).
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace simt {

using Mask = uint32_t;  // of lanes
constexpr int kLanes = 32;
constexpr Mask kAll = ~Mask{0};
struct Ins;
enum class Order : uint8_t { weak, relaxed, acquire, release, acq_rel, is_volatile };
enum class Scope : uint8_t { none, cta, gpu, sys };

using Clock = std::vector<uint32_t>;  // by agent: a lane, or one side of a copy engine
using Shared = std::shared_ptr<const Clock>;

struct Views {
  Shared plain, async;
};

// Agents that have one time in common: the lanes of a warp, or one of the engines'.
struct Agents {
  int rank, block, warp;
  const char* what;  // "lane", or which side of the engine
  uint32_t base;     // of the first of them in every clock
  uint32_t now = 1;
};

struct Access {
  Agents* by;
  Mask lanes;
  uint32_t at;  // its agents' time
  const Ins* ins;
  uint8_t bytes;  // of the word
  Scope strong;   // none: weak
  bool async;
};
struct Cell {
  std::vector<Access> writes, reads;
};

// What the checker keeps of a warp.
struct WarpOrder {
  Agents* lanes = nullptr;
  Views views[kLanes];
  Agents* store_reads[kLanes] = {};   // of the bulk stores that a lane has started: out of shared memory
  Agents* store_writes[kLanes] = {};  // and into global memory
};

}  // namespace simt
