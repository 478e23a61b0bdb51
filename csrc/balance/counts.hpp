// Replica counts: the number of slots of each expert. 1 <= count[e] <= ranks, and the counts sum to `slots`.
#pragma once
#include <cstdint>

namespace moecomm::balance {

// Repeatedly adds a replica to the expert with the hottest replicas. This makes the largest replica as small
// as possible, and apart from ties only these counts do. Ties: fewer replicas first, then the lower id, so
// that experts without load get replicas evenly too.
void split_hottest(const double* load, int experts, int slots, int ranks, int32_t* count);

}  // namespace moecomm::balance
