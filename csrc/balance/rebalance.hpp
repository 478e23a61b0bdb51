// Static plan of one layer: which expert every slot of every rank holds, from the experts' loads.
#pragma once
#include <cstdint>

namespace moecomm::balance {

struct Grid {
  int32_t experts = 0;
  int32_t slots = 0;   // over all ranks; rank r has slots [r * slots / ranks, (r + 1) * slots / ranks)
  int32_t groups = 1;  // consecutive experts; a group's replicas stay in one node where groups > 1
  int32_t nodes = 1;
  int32_t ranks = 1;
};

struct Options {
  const int32_t* previous = nullptr;  // [slots]: the placement that is in force, or null
  int32_t max_moves = -1;             // most slots of a rank that may change their expert; -1: any
  bool connected =
      false;  // replicated experts join all ranks (see pack_connected); three slots per rank or more
};

// load[experts] finite and >= 0, of any magnitude: only their ratios matter. slots a multiple of ranks,
// experts <= slots <= experts * (ranks that may hold an expert).
// Writes placement[slots]; a pure function of its input. Thread-safe. Every loop is bounded.
void rebalance_layer(const Grid& grid, const double* load, const Options& options, int32_t* placement);

}  // namespace moecomm::balance
