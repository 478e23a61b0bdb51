#include "balance/replicas.hpp"

namespace moecomm::balance {

Replicas::Replicas(const int32_t* table, int slots_, int experts_, int ranks_, int nodes_)
    : experts(experts_), ranks(ranks_), nodes(nodes_), slots(slots_), first(experts_ + 1, 0) {
  for (int p = 0; p < slots; ++p) ++first[table[p] + 1];
  for (int e = 0; e < experts; ++e) first[e + 1] += first[e];
  slot.resize(slots);
  rank.resize(slots);
  expert.resize(slots);
  at_slot.resize(slots);
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  for (int p = 0; p < slots; ++p) {
    const int at = next[table[p]]++;
    slot[at] = p;
    rank[at] = p / (slots / ranks);
    expert[at] = table[p];
    at_slot[p] = at;
  }
  for (int e = 0; e < experts; ++e)
    if (count(e) > 1) shared.push_back(e);
}

}  // namespace moecomm::balance
