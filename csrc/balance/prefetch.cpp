#include "balance/prefetch.hpp"

#include <algorithm>
#include <numeric>

namespace moecomm::balance {

namespace {

constexpr int kHalvings = 16;       // of the search for the lowest level
constexpr double kRounding = 1e-9;  // of the mean: less than this is no load
constexpr double kSameNode = 0.5;   // a way inside the node is worth so much more

}  // namespace

Prefetch::Prefetch(const PrefetchShape& shape, const double* load, const int32_t* table)
    : s_(shape),
      load_(load),
      table_(table),
      own_(shape.ranks),
      donors_(shape.ranks),
      held_(int64_t{shape.ranks} * shape.experts) {
  for (int r = 0; r < s_.ranks; ++r) {
    const int32_t* slots = slots_of(r);
    for (int j = 0; j < s_.slots - s_.spare; ++j) own_[r] += load_[slots[j]];
    for (int j = s_.slots - s_.spare; j < s_.slots; ++j) held_[int64_t{r} * s_.experts + slots[j]] = 1;
  }
  std::iota(donors_.begin(), donors_.end(), 0);
  std::stable_sort(donors_.begin(), donors_.end(), [&](int a, int b) { return own_[a] > own_[b]; });
  mean_ = std::accumulate(own_.begin(), own_.end(), 0.0) / s_.ranks;
  tiny_ = kRounding * std::max(mean_, 1e-300);
}

int64_t Prefetch::lowest(int64_t most, int32_t* table) const {
  Copies best(s_.ranks), found;
  double low = mean_, high = own_[donors_[0]];
  if (reach(low, most, found)) {
    best.swap(found);
  } else {
    for (int i = 0; i < kHalvings; ++i) {
      const double level = (low + high) / 2;
      if (reach(level, most, found)) {
        high = level;
        best.swap(found);
      } else {
        low = level;
      }
    }
  }
  return place(best, table);
}

// Copies with which no rank is above `level`; false where that takes more than `most`, or more than fit.
bool Prefetch::reach(double level, int64_t most, Copies& copies) const {
  copies.assign(s_.ranks, {});
  std::vector<double> room(s_.ranks);
  for (int r = 0; r < s_.ranks; ++r) room[r] = level - own_[r];
  std::vector<int32_t> free(s_.ranks, s_.spare), hottest(s_.slots - s_.spare);
  int64_t moved = 0;
  for (const int donor : donors_) {
    double excess = own_[donor] - level;
    if (excess <= tiny_) break;  // so have all that follow
    std::copy_n(slots_of(donor), hottest.size(), hottest.begin());
    std::stable_sort(hottest.begin(), hottest.end(), [&](int a, int b) { return load_[a] > load_[b]; });
    for (const int expert : hottest) {
      double amount = load_[expert];
      while (excess > tiny_ && amount > tiny_) {
        const int to = roomiest(donor, expert, std::min(excess, amount), level, room, free);
        if (to < 0) return false;
        moved += !holds(to, expert);
        if (most >= 0 && moved > most) return false;
        const double given = std::min({excess, amount, room[to]});
        copies[to].push_back(expert);
        free[to] -= 1;
        room[to] -= given;
        excess -= given;
        amount -= given;
      }
    }
    if (excess > tiny_) return false;
  }
  return true;
}

// Where `amount` of a donor's expert goes: a rank that has a copy already, else one of the donor's node if it
// takes enough, else the one that takes most. -1: none has room and a free slot.
int Prefetch::roomiest(int donor, int expert, double amount, double level, const std::vector<double>& room,
                       const std::vector<int32_t>& free) const {
  const int per_node = s_.ranks / s_.nodes;
  int best = -1;
  double most = -1;
  for (int r = 0; r < s_.ranks; ++r) {
    if (room[r] <= tiny_ || free[r] == 0) continue;
    const double near = r / per_node == donor / per_node ? 1 + kSameNode : 1;
    const double worth = std::min(amount, room[r]) * near + (holds(r, expert) ? 2 * level : 0);
    if (worth > most) {
      most = worth;
      best = r;
    }
  }
  return best;
}

// What is there already keeps its slot, and so does what nothing replaces.
int64_t Prefetch::place(const Copies& copies, int32_t* table) const {
  std::copy_n(table_, int64_t{s_.ranks} * s_.slots, table);
  int64_t moved = 0;
  for (int r = 0; r < s_.ranks; ++r) {
    std::vector<int32_t> wanted = copies[r];
    std::sort(wanted.begin(), wanted.end());
    int32_t* slot = table + int64_t{r} * s_.slots + (s_.slots - s_.spare);
    for (const int expert : wanted) {
      if (holds(r, expert)) continue;
      while (std::binary_search(wanted.begin(), wanted.end(), *slot)) ++slot;
      *slot++ = expert;
      ++moved;
    }
  }
  return moved;
}

}  // namespace moecomm::balance
