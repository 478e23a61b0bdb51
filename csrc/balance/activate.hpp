// Dynamic redundancy: a rank hosts more experts than it may run in one batch; which ones run?
#pragma once
#include "balance/replicas.hpp"

namespace moecomm::balance {

// Chooses active[replicas] such that no rank runs more than `limit` replicas and every expert with load runs
// somewhere. It begins with few replicas that balance the ranks perfectly (forest.hpp) and stops replicas on
// ranks above the limit. Then it reduces the load of the heaviest rank step by step: an idle replica of one
// of its experts starts elsewhere, or two ranks trade experts that both host. split.hpp then distributes the
// tokens over the active replicas.
//
// load[experts]. Returns -1, or an expert for which no rank has room; then no choice exists. A pure function
// of its input, so every rank computes the same.
int activate(const Replicas& r, const double* load, int limit, uint8_t* active);

}  // namespace moecomm::balance
