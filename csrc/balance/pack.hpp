// Packing: replicas into the slots of ranks so that the heaviest rank is light.
#pragma once
#include "balance/bins.hpp"

namespace moecomm::balance {

// Largest first into the lightest rank that has a free slot and not yet that expert. Every slot is filled:
// the counts sum to ranks * slots.
void pack_largest_first(const double* load, const int32_t* count, int experts, Bins& bins);

// Swaps replicas between the heaviest rank and another one for as long as that lowers the heavier of the two,
// until no rank carries more than `enough`.
void swap_down(Bins& bins, double enough);

}  // namespace moecomm::balance
