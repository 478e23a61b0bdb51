// Bins: ranks with a fixed number of expert slots, the expert in every slot, and the load of each rank.
//
// The common state of all algorithms that place replicas. Invariant once it is filled: no rank holds an
// expert twice.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace moecomm::balance {

struct Bins {
  int ranks = 0;
  int slots = 0;                // per rank
  std::vector<int32_t> expert;  // [ranks, slots]; -1: empty
  std::vector<double> size;     // [ranks, slots] load of that replica
  std::vector<double> load;     // [ranks]

  void reset(int r, int s) {
    ranks = r;
    slots = s;
    expert.assign(static_cast<size_t>(r) * s, -1);
    size.assign(static_cast<size_t>(r) * s, 0.0);
    load.assign(r, 0.0);
  }
  bool holds(int rank, int32_t e) const {
    const int32_t* at = expert.data() + static_cast<size_t>(rank) * slots;
    return std::find(at, at + slots, e) != at + slots;
  }
  void put(int rank, int slot, int32_t e, double replica_load) {
    const size_t at = static_cast<size_t>(rank) * slots + slot;
    load[rank] += replica_load - size[at];
    expert[at] = e;
    size[at] = replica_load;
  }
  void swap(int a, int i, int b, int j) {
    const size_t x = static_cast<size_t>(a) * slots + i, y = static_cast<size_t>(b) * slots + j;
    const double moved = size[x] - size[y];
    std::swap(expert[x], expert[y]);
    std::swap(size[x], size[y]);
    load[a] -= moved;
    load[b] += moved;
  }
  int heaviest() const { return static_cast<int>(std::max_element(load.begin(), load.end()) - load.begin()); }
  int lightest() const { return static_cast<int>(std::min_element(load.begin(), load.end()) - load.begin()); }
  double max_load() const { return *std::max_element(load.begin(), load.end()); }
};

}  // namespace moecomm::balance
