// Placement with two slots per rank: searches replica counts and placement together.
//
// For given counts the best placement is known: the largest replica with the smallest, the second largest
// with the second smallest, and so on. So only the counts are searched. The heaviest rank can have at most
// load T if for every t < T/2 there are as many replicas of size at most t as replicas of size at least T -
// t, which need them as partners. A ledger over t records the difference, and a split of an expert changes it
// in a known way. T is found by bisection.
#pragma once
#include "balance/bins.hpp"

namespace moecomm::balance {

// bins: reset to (ranks, 2). enough: a load of the heaviest rank that needs no improvement.
void place_pairs(const double* load, int experts, double enough, Bins& bins);

}  // namespace moecomm::balance
