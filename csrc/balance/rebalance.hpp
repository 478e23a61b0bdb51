// The placement of one layer: computes which expert every slot of every rank holds, from the experts' loads.
#pragma once
#include <cstdint>

namespace moecomm::balance {

struct Grid {
  int32_t experts = 0;
  int32_t slots = 0;   // over all ranks; rank r has slots [r * slots / ranks, (r + 1) * slots / ranks)
  int32_t groups = 1;  // of consecutive experts; if groups > 1, the replicas of a group stay in one node
  int32_t nodes = 1;
  int32_t ranks = 1;
};

struct Options {
  const int32_t* previous = nullptr;  // [slots]: the current placement, or null
  int32_t max_moves = -1;             // the most slots of a rank that may change their expert; -1: any number
  bool connected = false;  // shared experts connect all ranks (pack_connected); needs three slots per rank
};

// load[experts] must be finite and >= 0; only the ratios matter. slots must be a multiple of ranks, and
// experts <= slots <= experts * (ranks that may hold an expert).
// Writes placement[slots]. A pure function of its input, thread-safe, and every loop is bounded.
void rebalance_layer(const Grid& grid, const double* load, const Options& options, int32_t* placement);

}  // namespace moecomm::balance
