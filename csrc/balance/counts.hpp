// Replica counts: how many slots each expert gets. 1 <= count[e] <= ranks, the counts sum to `slots`.
#pragma once
#include <cstdint>
#include <vector>

namespace moecomm::balance {

// The hottest replica is split again and again: minimal largest replica. Ties: fewer replicas, then lower id,
// so that loads of zero spread too.
void split_hottest(const double* load, int experts, int slots, int ranks, int32_t* count);

// Counts with the same largest replica as split_hottest, as near to `previous` as possible: only experts whose
// replicas would exceed it get more. For one slot per rank this is the whole placement.
void split_hottest_near(const double* load, int experts, int slots, int ranks, const int32_t* previous, int32_t* count);

}  // namespace moecomm::balance
