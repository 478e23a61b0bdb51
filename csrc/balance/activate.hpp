// Dynamic redundancy: a rank hosts more experts than it may run in one batch; which ones run?
#pragma once
#include "balance/replicas.hpp"

namespace moecomm::balance {

// Chooses active[replicas] such that no rank runs more than `limit` and every expert with load runs
// somewhere. Begins with few replicas that balance the ranks perfectly (forest.hpp), stops what exceeds the
// limit, and then lightens the heaviest rank step by step: an idle replica of one of its experts starts
// elsewhere, or two ranks trade experts that both host. The tokens are then split over what is active
// (split.hpp).
//
// load[experts]. Returns -1, or an expert for which no rank has room: then no choice at all exists. A pure
// function of its input: every rank computes the same.
int activate(const Replicas& r, const double* load, int limit, uint8_t* active);

}  // namespace moecomm::balance
