#include "balance/pack.hpp"

#include <numeric>

namespace moecomm::balance {
namespace {

constexpr int kSwapsPerSlot = 8;  // a limit: with rounding, the swaps might never end

std::vector<std::pair<double, int32_t>> by_size(const double* load, const int32_t* count, int experts) {
  std::vector<std::pair<double, int32_t>> order(
      experts);  // (-size, expert): equal sizes are ordered by expert
  for (int e = 0; e < experts; ++e) order[e] = {-load[e] / count[e], e};
  std::sort(order.begin(), order.end());
  return order;
}

// Fills bins expert by expert.
class Packing {
 public:
  explicit Packing(Bins& b) : b_(b), used_(b.ranks, 0), open_(b.load) {}

  // Puts each replica on the lightest preferred open rank, else on the lightest open rank.
  template <class Preferred, class Taken = void (*)(int)>
  void put(int32_t e, double piece, int replicas, Preferred preferred, Taken taken = [](int) {}) {
    int missing = 0;
    for (int c = 0; c < replicas; ++c) {
      int r = static_cast<int>(std::min_element(open_.begin(), open_.end()) - open_.begin());
      if (open_[r] >= kFull) {
        ++missing;
        continue;
      }
      if (!preferred(r)) {
        int best = -1;
        for (int i = 0; i < b_.ranks; ++i)
          if (open_[i] < kFull && preferred(i) && (best < 0 || open_[i] < open_[best])) best = i;
        if (best >= 0) r = best;
      }
      b_.put(r, used_[r]++, e, piece);
      open_[r] = kFull;  // a rank must not get the expert twice
      taken_.push_back(r);
      taken(r);
    }
    if (missing) {
      for (; missing > 0; --missing) put_by_moving(e, piece);
      for (int r = 0; r < b_.ranks; ++r) reopen(r);
    }
    for (const int r : taken_) reopen(r);
    taken_.clear();
  }

 private:
  static constexpr double kFull = 1e300;  // a full rank looks infinitely heavy
  void reopen(int r) { open_[r] = used_[r] == b_.slots ? kFull : b_.load[r]; }

  // The only free slots are on ranks that already hold e: moves another rank's replica there and takes its
  // slot. This is always possible: a full rank without e holds more experts than the other rank has besides
  // e.
  void put_by_moving(int32_t e, double piece) {
    for (int to = 0; to < b_.ranks; ++to) {
      if (used_[to] == b_.slots) continue;
      for (int from = 0; from < b_.ranks; ++from) {
        if (b_.holds(from, e)) continue;
        for (int i = 0; i < b_.slots; ++i) {
          const size_t at = static_cast<size_t>(from) * b_.slots + i;
          if (b_.holds(to, b_.expert[at])) continue;
          b_.put(to, used_[to]++, b_.expert[at], b_.size[at]);
          b_.put(from, i, e, piece);
          return;
        }
      }
    }
  }

  Bins& b_;
  std::vector<int> used_, taken_;
  std::vector<double> open_;
};

struct BestSwap {
  double worst;
  int rank = -1, i = 0, j = 0;
};

// Updates `best` with the best swap between ranks h and r: the one with the least load of the heavier rank.
void best_swap(const Bins& b, int h, int r, const int32_t* count, BestSwap& best) {
  const double *x = b.size.data() + static_cast<size_t>(h) * b.slots,
               *y = b.size.data() + static_cast<size_t>(r) * b.slots;
  const double high = b.load[h], low = b.load[r];
  if ((high + low) / 2 >= best.worst) return;  // even an ideal swap would not be better
  for (int i = 0; i < b.slots; ++i) {
    for (int j = 0; j < b.slots; ++j) {
      const double moved = x[i] - y[j];
      const double worst = std::max(high - moved, low + moved);
      if (worst >= best.worst) continue;
      const int32_t mine = b.expert[static_cast<size_t>(h) * b.slots + i],
                    theirs = b.expert[static_cast<size_t>(r) * b.slots + j];
      if (count && (count[mine] > 1 || count[theirs] > 1)) continue;
      if (mine == theirs || b.holds(r, mine) || b.holds(h, theirs)) continue;
      best = {worst, r, i, j};
    }
  }
}

}  // namespace

void pack_largest_first(const double* load, const int32_t* count, int experts, Bins& b) {
  Packing packing(b);
  for (const auto& [negative, e] : by_size(load, count, experts))
    packing.put(e, -negative, count[e], [](int) { return true; });
}

void pack_connected(const double* load, const int32_t* count, int experts, Bins& b) {
  Packing packing(b);
  std::vector<int> part(b.ranks);  // equal for ranks that shared experts connect
  std::iota(part.begin(), part.end(), 0);
  const auto order = by_size(load, count, experts);
  for (const auto& [negative, e] : order) {
    if (count[e] == 1) continue;
    std::vector<int> joined;
    packing.put(
        e, -negative, count[e],
        [&](int r) { return std::find(joined.begin(), joined.end(), part[r]) == joined.end(); },
        [&](int r) { joined.push_back(part[r]); });
    for (int& p : part)
      if (std::find(joined.begin(), joined.end(), p) != joined.end()) p = joined[0];
  }
  for (const auto& [negative, e] : order)
    if (count[e] == 1) packing.put(e, -negative, 1, [](int) { return true; });
}

void swap_down(Bins& b, double enough, const int32_t* count) {
  const int most = kSwapsPerSlot * b.ranks * b.slots;  // usually less than one per slot is needed
  for (int swaps = 0; swaps < most; ++swaps) {
    const int h = b.heaviest();
    if (b.load[h] <= enough) return;
    BestSwap best{b.load[h] * (1 - 1e-9)};
    const int l = b.lightest();
    best_swap(b, h, l, count, best);
    for (int r = 0; r < b.ranks && best.worst > enough; ++r)
      if (r != h && r != l) best_swap(b, h, r, count, best);
    if (best.rank < 0) return;
    b.swap(h, best.i, best.rank, best.j);
  }
}

}  // namespace moecomm::balance
