// Bounded moves: a placement is improved while no rank changes more slots than a given number.
//
// One round changes at most one slot per rank: every rank passes one replica on, and the replicas that were
// passed on are handed out again, largest to the rank that is lightest without its own. That handing out is
// optimal, so only the choice of what to pass on is searched. Counts change on the way: a replica of an
// expert that can spare one is replaced, while it is in no rank, by one of an expert that has grown too hot.
#pragma once
#include <vector>

#include "balance/bins.hpp"

namespace moecomm::balance {

// bins holds the placement in force; sizes and loads are set here. Makes at most `rounds` rounds and stops
// when no rank carries more than `enough`.
void exchange(const double* load, int experts, int rounds, double enough, Bins& bins);

}  // namespace moecomm::balance
