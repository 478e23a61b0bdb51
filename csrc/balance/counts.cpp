#include "balance/counts.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moecomm::balance {
namespace {

struct Piece {
  double size;
  int32_t count;
  int32_t expert;
  // A heap's top: largest piece; ties to fewer replicas, then to the lower id.
  bool operator<(const Piece& o) const {
    if (size != o.size) return size < o.size;
    return count != o.count ? count > o.count : expert > o.expert;
  }
};

// Splits on until the counts sum to `slots`.
void split_from(const double* load, int experts, int slots, int ranks, int32_t* count) {
  std::vector<Piece> heap;
  int left = slots;
  for (int e = 0; e < experts; ++e) {
    left -= count[e];
    if (count[e] < ranks) heap.push_back({load[e] / count[e], count[e], e});
  }
  std::make_heap(heap.begin(), heap.end());
  for (; left > 0; --left) {
    std::pop_heap(heap.begin(), heap.end());
    Piece& p = heap.back();
    count[p.expert] = ++p.count;
    p.size = load[p.expert] / p.count;
    if (p.count < ranks) std::push_heap(heap.begin(), heap.end());
    else heap.pop_back();
  }
}

}  // namespace

void split_hottest(const double* load, int experts, int slots, int ranks, int32_t* count) {
  std::fill(count, count + experts, 1);
  split_from(load, experts, slots, ranks, count);
}

void split_hottest_near(const double* load, int experts, int slots, int ranks, const int32_t* previous, int32_t* count) {
  split_hottest(load, experts, slots, ranks, count);
  double largest = 0;
  for (int e = 0; e < experts; ++e) largest = std::max(largest, load[e] / count[e]);
  const auto needed = [&](int e) {
    if (load[e] <= 0) return 1;
    int n = std::max(1, static_cast<int>(std::ceil(load[e] / largest)));
    while (load[e] / n > largest) ++n;                     // the quotient above was rounded
    while (n > 1 && load[e] / (n - 1) <= largest) --n;
    return n;
  };
  int sum = 0;
  for (int e = 0; e < experts; ++e) sum += count[e] = std::max(needed(e), std::min<int>(previous[e], ranks));
  // Too many: take where the replicas stay smallest. Too few (the slots grew): split the hottest.
  while (sum > slots) {
    int from = -1;
    for (int e = 0; e < experts; ++e)
      if (count[e] > needed(e) && (from < 0 || load[e] / (count[e] - 1) < load[from] / (count[from] - 1))) from = e;
    --count[from];
    --sum;
  }
  split_from(load, experts, slots, ranks, count);
}

}  // namespace moecomm::balance
