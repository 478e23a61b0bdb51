#include "balance/relabel.hpp"

#include <algorithm>

namespace moecomm::balance {

std::vector<int> match_places(const std::vector<int32_t>& kept, int n) {
  // Shortest augmenting paths with potentials; cost of (set i, place j) is -kept[i, j].
  constexpr int32_t kFar = 1 << 30;
  std::vector<int32_t> set_price(n), place_price(n, 0);
  std::vector<int> place_of(n, -1), set_at(n, -1);
  std::vector<int> unplaced;
  for (int i = 0; i < n; ++i) {  // for most sets the best place is free
    const int32_t* row = kept.data() + static_cast<size_t>(i) * n;
    set_price[i] = -*std::max_element(row, row + n);
    for (int j = 0; j < n && place_of[i] < 0; ++j)
      if (set_at[j] < 0 && -row[j] == set_price[i]) place_of[i] = j, set_at[j] = i;
    if (place_of[i] < 0) unplaced.push_back(i);
  }
  std::vector<int32_t> distance(n);
  std::vector<int> from(n), open(n);
  for (const int start : unplaced) {
    std::fill(distance.begin(), distance.end(), kFar);
    int count = n, end = -1, set = start;
    for (int j = 0; j < n; ++j) open[j] = j;  // the first `count`: places not reached yet
    int32_t reached = 0;
    std::vector<int> closed;
    while (end < 0) {
      const int32_t* row = kept.data() + static_cast<size_t>(set) * n;
      const int32_t base = reached - set_price[set];
      int32_t least = kFar;
      int nearest = 0;
      for (int k = 0; k < count; ++k) {
        const int j = open[k];
        const int32_t d = base - row[j] - place_price[j];
        if (d < distance[j]) distance[j] = d, from[j] = set;
        if (distance[j] < least || (distance[j] == least && set_at[j] < 0)) least = distance[j], nearest = k;
      }
      reached = least;
      const int place = open[nearest];
      if (set_at[place] < 0) {
        end = place;
      } else {
        open[nearest] = open[--count];
        closed.push_back(place);
        set = set_at[place];
      }
    }
    set_price[start] += reached;
    for (const int j : closed) {
      set_price[set_at[j]] += reached - distance[j];
      place_price[j] -= reached - distance[j];
    }
    for (int j = end; j >= 0;) {  // reassign along the path
      const int i = from[j], freed = place_of[i];
      place_of[i] = j;
      set_at[j] = i;
      j = i == start ? -1 : freed;
    }
  }
  return place_of;
}

void align_slots(int ranks, int slots, const int32_t* previous, int32_t* placement) {
  std::vector<int32_t> fresh;
  for (int r = 0; r < ranks; ++r) {
    const int32_t* before = previous + static_cast<int64_t>(r) * slots;
    int32_t* now = placement + static_cast<int64_t>(r) * slots;
    fresh.clear();
    for (int i = 0; i < slots; ++i)
      if (std::find(before, before + slots, now[i]) == before + slots) fresh.push_back(now[i]);
    std::vector<int32_t> aligned(before, before + slots);
    auto next = fresh.begin();
    for (int i = 0; i < slots; ++i)
      if (std::find(now, now + slots, before[i]) == now + slots) aligned[i] = *next++;
    std::copy(aligned.begin(), aligned.end(), now);
  }
}

void relabel_ranks(int ranks, int slots, int experts, const int32_t* previous, int32_t* placement) {
  std::vector<std::vector<int>> holders(experts);
  const int total = ranks * slots;
  for (int i = 0; i < total; ++i)
    if (previous[i] >= 0 && previous[i] < experts) holders[previous[i]].push_back(i / slots);
  std::vector<int32_t> kept(static_cast<size_t>(ranks) * ranks, 0);
  for (int i = 0; i < total; ++i)
    for (const int old : holders[placement[i]]) ++kept[static_cast<size_t>(i / slots) * ranks + old];
  const std::vector<int> place_of = match_places(kept, ranks);
  const std::vector<int32_t> sets(placement, placement + total);
  for (int r = 0; r < ranks; ++r)
    std::copy(sets.begin() + static_cast<int64_t>(r) * slots,
              sets.begin() + static_cast<int64_t>(r + 1) * slots,
              placement + static_cast<int64_t>(place_of[r]) * slots);
  align_slots(ranks, slots, previous, placement);
}

}  // namespace moecomm::balance
