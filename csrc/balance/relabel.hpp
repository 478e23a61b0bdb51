// Relabeling: chooses which rank takes which of the new sets of experts, so that as many replicas as possible
// stay where they are. Ranks are interchangeable, so this does not change the balance.
#pragma once
#include <cstdint>
#include <vector>

namespace moecomm::balance {

// kept[i, j] of [n, n]: how many replicas stay if old place j takes new set i. Returns the old place of every
// new set such that the most replicas stay (an assignment problem).
std::vector<int> match_places(const std::vector<int32_t>& kept, int n);

// Reorders the ranks' sets in placement[ranks, slots] to match previous[ranks, slots]. A replica that stays
// on its rank keeps its slot.
void relabel_ranks(int ranks, int slots, int experts, const int32_t* previous, int32_t* placement);

// Reorders only the slots: every rank keeps its set.
void align_slots(int ranks, int slots, const int32_t* previous, int32_t* placement);

}  // namespace moecomm::balance
