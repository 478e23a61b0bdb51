// Logical picks to physical ones: which replica serves every (token, expert).
#pragma once
#include "balance/replicas.hpp"

namespace moecomm::balance {

// The first bad pick of a batch; code 0 where there is none.
struct Refusal {
  int32_t code = 0;  // 1: id out of range, 2: id twice in a token
  int32_t token = 0;
  int64_t id = 0;
};

// counts[experts] out: this source's picks per expert; -1 is no pick. Refuses ids that dispatch would refuse.
Refusal count_picks(const int64_t* ids, int tokens, int top_k, int experts, int32_t* counts);

// Keeps to the quotas, token by token: of the replicas that have quota left one in a node that the token
// visits anyway, else the one with the most left. A pick without any quota (no replica lives) becomes -1.
void route_by_quota(const Replicas& r, const int64_t* ids, int tokens, int top_k, int own_node,
                    int32_t* quota, int64_t* physical);

// No quotas: as few nodes per token as a greedy choice finds (its own is free), then the rank of those nodes
// that this source has given the fewest rows so far; ties start at replica (expert + turn) mod n.
void route_locally(const Replicas& r, const int64_t* ids, int tokens, int top_k, int own_node,
                   const uint8_t* active, int turn, int64_t* physical);

}  // namespace moecomm::balance
