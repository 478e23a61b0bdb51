// Maps picks of logical experts to expert slots: chooses the replica for every (token, expert).
#pragma once
#include "balance/replicas.hpp"
#include "base/types.hpp"

namespace moecomm::balance {

// The first invalid pick of a batch.
struct Refusal {
  BadInput bad = BadInput::none;
  int32_t token = 0;
  int64_t id = 0;
};

// counts[experts] out: this source's picks per expert; -1 is no pick. Refuses the ids that dispatch would
// refuse.
Refusal count_picks(const int64_t* ids, int tokens, int top_k, int experts, int32_t* counts);

// Chooses replicas token by token within quotas: of the replicas with quota left, one in a node that the
// token goes to anyway, else the one with the most quota left. A pick without any quota (no active replica)
// becomes -1.
void route_by_quota(const Replicas& r, const int64_t* ids, int tokens, int top_k, int own_node,
                    int32_t* quota, int64_t* physical);

// Chooses replicas without quotas: as few nodes per token as a greedy choice finds (the source's own node is
// always among them), then of these nodes the rank to which this source has sent the fewest rows so far. Ties
// start at replica (expert + rotation) mod n.
void route_locally(const Replicas& r, const int64_t* ids, int tokens, int top_k, int own_node,
                   const uint8_t* active, int rotation, int64_t* physical);

}  // namespace moecomm::balance
