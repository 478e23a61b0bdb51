// Replica counts: how many slots each expert gets. 1 <= count[e] <= ranks, the counts sum to `slots`.
#pragma once
#include <cstdint>

namespace moecomm::balance {

// The hottest replica is split again and again, which makes the largest one as small as it can be, and (but
// for ties) by the only counts that do. Ties: fewer replicas, then lower id, so that loads of zero spread
// too.
void split_hottest(const double* load, int experts, int slots, int ranks, int32_t* count);

}  // namespace moecomm::balance
