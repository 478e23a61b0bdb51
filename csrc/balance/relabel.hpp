// Relabelling: which rank takes which of the new sets of experts, so that most replicas stay where they are.
// Ranks are interchangeable for balance, so this costs nothing but the search.
#pragma once
#include <cstdint>
#include <vector>

namespace moecomm::balance {

// kept[n, n]: what old place j keeps if it takes new set i. Returns the old place of every new set such that
// the most is kept in all (an assignment problem).
std::vector<int> match_places(const std::vector<int32_t>& kept, int n);

// Reorders the rank sets of placement[ranks, slots] towards previous[ranks, slots]; a replica that stays on
// its rank keeps its slot.
void relabel_ranks(int ranks, int slots, int experts, const int32_t* previous, int32_t* placement);

// Slots only: every rank keeps its set.
void align_slots(int ranks, int slots, const int32_t* previous, int32_t* placement);

}  // namespace moecomm::balance
