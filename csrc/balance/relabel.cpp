#include "balance/relabel.hpp"

#include <algorithm>

namespace moecomm::balance {

std::vector<int> match_places(const std::vector<int32_t>& kept, int n) {
  struct Edge {
    int32_t weight;
    int set, place;
  };
  std::vector<Edge> edges;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j)
      if (kept[i * n + j] > 0) edges.push_back({kept[i * n + j], i, j});
  std::stable_sort(edges.begin(), edges.end(), [](const Edge& a, const Edge& b) { return a.weight > b.weight; });
  std::vector<int> place_of(n, -1), set_at(n, -1);
  for (const Edge& e : edges)
    if (place_of[e.set] < 0 && set_at[e.place] < 0) {
      place_of[e.set] = e.place;
      set_at[e.place] = e.set;
    }
  for (int i = 0, free = 0; i < n; ++i) {
    if (place_of[i] >= 0) continue;
    while (set_at[free] >= 0) ++free;
    place_of[i] = free;
    set_at[free] = i;
  }
  for (bool better = true; better;) {
    better = false;
    for (const Edge& e : edges) {
      const int a = e.set, b = set_at[e.place], from = place_of[a];
      if (a == b) continue;
      if (e.weight + kept[b * n + from] > kept[a * n + from] + kept[b * n + e.place]) {
        std::swap(place_of[a], place_of[b]);
        std::swap(set_at[from], set_at[e.place]);
        better = true;
      }
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
    std::copy(sets.begin() + static_cast<int64_t>(r) * slots, sets.begin() + static_cast<int64_t>(r + 1) * slots,
              placement + static_cast<int64_t>(place_of[r]) * slots);
  align_slots(ranks, slots, previous, placement);
}

}  // namespace moecomm::balance
