// Two slots per rank: replica counts and placement together.
//
// For given counts the best placement is known: largest replica with smallest, second largest with second
// smallest, and so on. So only the counts are searched. A limit T on the heaviest rank can be met if for
// every t < T/2 the replicas of at most t are as many as those of at least T - t, which need them as
// partners: a ledger over t that a split of an expert improves in a known way. T is found by bisection.
#pragma once
#include "balance/bins.hpp"

namespace moecomm::balance {

// bins: reset to (ranks, 2). `enough`: a heaviest rank that need not get lighter.
void place_pairs(const double* load, int experts, double enough, Bins& bins);

}  // namespace moecomm::balance
