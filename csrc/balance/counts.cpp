#include "balance/counts.hpp"

#include <algorithm>
#include <vector>

namespace moecomm::balance {
namespace {

struct Candidate {
  double size;
  int32_t count;
  int32_t expert;
  // The top of the heap: the largest replica; ties: fewer replicas, then the lower id.
  bool operator<(const Candidate& o) const {
    if (size != o.size) return size < o.size;
    return count != o.count ? count > o.count : expert > o.expert;
  }
};

}  // namespace

void split_hottest(const double* load, int experts, int slots, int ranks, int32_t* count) {
  std::fill(count, count + experts, 1);
  std::vector<Candidate> heap;
  for (int e = 0; e < experts; ++e)
    if (ranks > 1) heap.push_back({load[e], 1, e});
  std::make_heap(heap.begin(), heap.end());
  for (int left = slots - experts; left > 0; --left) {
    std::pop_heap(heap.begin(), heap.end());
    Candidate& p = heap.back();
    count[p.expert] = ++p.count;
    p.size = load[p.expert] / p.count;
    if (p.count < ranks)
      std::push_heap(heap.begin(), heap.end());
    else
      heap.pop_back();
  }
}

}  // namespace moecomm::balance
