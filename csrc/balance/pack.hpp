// Packing: replicas into the slots of ranks so that the heaviest rank is light.
#pragma once
#include "balance/bins.hpp"

namespace moecomm::balance {

// Largest first into the lightest rank that has a free slot and not yet that expert. Every slot is filled:
// the counts sum to ranks * slots.
void pack_largest_first(const double* load, const int32_t* count, int experts, Bins& bins);

// The same, but replicated experts come first, each on ranks that no earlier one has joined where there are
// such: so they soon join all ranks, and at run time load can flow from any rank to any other through shared
// experts.
void pack_connected(const double* load, const int32_t* count, int experts, Bins& bins);

// Swaps replicas between the heaviest rank and another one for as long as that lowers the heavier of the two,
// until no rank carries more than `enough`. Experts with several replicas stay where `count` is given.
void swap_down(Bins& bins, double enough, const int32_t* count = nullptr);

}  // namespace moecomm::balance
