// Packing: puts replicas into the slots of ranks such that the heaviest rank is as light as possible.
#pragma once
#include "balance/bins.hpp"

namespace moecomm::balance {

// Puts replicas, largest first, into the lightest rank that has a free slot and does not hold the expert yet.
// Every slot is filled: the counts sum to ranks * slots.
void pack_largest_first(const double* load, const int32_t* count, int experts, Bins& bins);

// The same, but replicated experts come first. Their replicas go to ranks that earlier shared experts have
// not connected yet, if possible. So shared experts soon connect all ranks, and at run time load can move
// from any rank to any other through shared experts.
void pack_connected(const double* load, const int32_t* count, int experts, Bins& bins);

// Swaps replicas between the heaviest rank and another one as long as this reduces the heavier of the two
// loads, and until no rank has more load than `enough`. If `count` is given, experts with several replicas
// are not moved.
void swap_down(Bins& bins, double enough, const int32_t* count = nullptr);

}  // namespace moecomm::balance
