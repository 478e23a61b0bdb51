// The replicas of one layer, indexed by expert, for the choices per batch (split, activate, route).
#pragma once
#include <cstdint>
#include <vector>

namespace moecomm::balance {

struct Replicas {
  int experts = 0, ranks = 0, nodes = 1, slots = 0;
  std::vector<int32_t> first;    // [experts + 1] the first replica of each expert
  std::vector<int32_t> slot;     // by replica; ascending within an expert
  std::vector<int32_t> rank;     // by replica
  std::vector<int32_t> expert;   // by replica
  std::vector<int32_t> at_slot;  // [slots] the replica in each slot
  std::vector<int32_t> shared;   // experts with several replicas

  // physical_to_logical[slots], every entry in [0, experts). An expert may have no slot, and has at most one
  // on a rank.
  Replicas(const int32_t* physical_to_logical, int slots, int experts, int ranks, int nodes);
  int count(int e) const { return first[e + 1] - first[e]; }
  int slots_per_rank() const { return slots / ranks; }
  int node(int replica) const { return rank[replica] / (ranks / nodes); }
};

}  // namespace moecomm::balance
