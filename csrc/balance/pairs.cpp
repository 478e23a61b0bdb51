#include "balance/pairs.hpp"

#include <cmath>
#include <numeric>

#include "balance/counts.hpp"

namespace moecomm::balance {
namespace {

constexpr int kSteps = 512;          // resolution of the ledger: T / 1024
constexpr double kPrecision = 5e-4;  // of the bisection

// For every step t the surplus of small replicas over the large ones that need them; below zero: a deficit.
class Ledger {
 public:
  void reset(double limit) {
    limit_ = limit;
    scale_ = 2 * kSteps / limit;
    std::fill(surplus_, surplus_ + kSteps, int16_t{0});
  }
  // Replicas of one size join (n > 0) or leave (n < 0). Rounded so that no deficit is missed.
  struct Effect {
    int from;
    int n;
  };
  Effect effect(double size, int n) const {
    if (2 * size <= limit_) return {std::min(kSteps, static_cast<int>(std::ceil(size * scale_))), n};
    return {std::max(0, static_cast<int>(std::floor((limit_ - size) * scale_))), -n};
  }
  void add(Effect e) {
    for (int i = e.from; i < kSteps; ++i) surplus_[i] = static_cast<int16_t>(surplus_[i] + e.n);
  }
  int first_deficit() const {
    for (int i = 0; i < kSteps; ++i)
      if (surplus_[i] < 0) return i;
    return kSteps;
  }
  // The sum of all deficits if a and b took effect.
  int deficit_with(Effect a, Effect b) const {
    if (a.from > b.from) std::swap(a, b);
    return deficit(0, a.from, 0) + deficit(a.from, b.from, a.n) + deficit(b.from, kSteps, a.n + b.n);
  }
  double at(int step) const { return step / scale_; }

 private:
  int deficit(int from, int to, int shift) const {
    int sum = 0;
    for (int i = from; i < to; ++i) sum -= std::min(0, surplus_[i] + shift);
    return sum;
  }
  double limit_ = 0, scale_ = 0;
  int16_t surplus_[kSteps];
};

class PairSearch {
 public:
  PairSearch(const double* load, int experts, int ranks) : load_(load), experts_(experts), ranks_(ranks), order_(experts) {
    std::iota(order_.begin(), order_.end(), 0);
    std::sort(order_.begin(), order_.end(), [&](int a, int b) { return load[a] != load[b] ? load[a] < load[b] : a < b; });
  }

  // Counts that meet the limit, if this finds any.
  bool meet(double limit, std::vector<int32_t>& count) {
    int left = 2 * ranks_;
    for (int e = 0; e < experts_; ++e) {
      const double n = std::max(1.0, std::ceil(load_[e] / limit));
      if (n > ranks_) return false;
      count[e] = static_cast<int32_t>(n);
      left -= count[e];
    }
    if (left < 0) return false;
    ledger_.reset(limit);
    for (int e = 0; e < experts_; ++e) ledger_.add(ledger_.effect(load_[e] / count[e], count[e]));
    for (int step; (step = ledger_.first_deficit()) < kSteps; --left) {
      if (left == 0) return false;
      const int e = best_split(step, limit, count);
      if (e < 0) return false;
      ledger_.add(ledger_.effect(load_[e] / count[e], -count[e]));
      ++count[e];
      ledger_.add(ledger_.effect(load_[e] / count[e], count[e]));
    }
    // What is left makes small replicas of cold experts: it can only help those that seek a partner.
    for (int i = 0; left > 0; i = (i + 1) % experts_)
      if (count[order_[i]] < ranks_) {
        ++count[order_[i]];
        --left;
      }
    return true;
  }

 private:
  // Of the splits that help at this step, the one that leaves the smallest deficits in all.
  int best_split(int step, double limit, const std::vector<int32_t>& count) const {
    int best = -1, least = 1 << 30;
    const auto consider = [&](int e) {
      if (count[e] >= ranks_) return;
      const int d = ledger_.deficit_with(ledger_.effect(load_[e] / count[e], -count[e]),
                                         ledger_.effect(load_[e] / (count[e] + 1), count[e] + 1));
      if (d < least) least = d, best = e;
    };
    // Large replicas that find no partner ...
    const double t = ledger_.at(step), large = limit - ledger_.at(step + 1);
    int seen = 0;
    for (int i = experts_ - 1; i >= 0 && seen < kLarge; --i) {
      const int e = order_[i];
      if (load_[e] < large) break;
      if (load_[e] / count[e] >= large) consider(e), ++seen;
    }
    // ... and those whose halves become partners: the largest such.
    const auto above = std::partition_point(order_.begin(), order_.end(), [&](int e) { return load_[e] <= 2 * t; });
    seen = 0;
    for (auto it = above; it != order_.begin() && seen < kSmall;) {
      const int e = *--it;
      if (count[e] == 1) consider(e), ++seen;
    }
    return best;
  }

  static constexpr int kLarge = 3, kSmall = 4;
  const double* load_;
  int experts_, ranks_;
  std::vector<int32_t> order_;   // experts by load
  Ledger ledger_;
};

struct Replica {
  double size;
  int32_t expert;
  bool operator<(const Replica& o) const { return size != o.size ? size < o.size : expert < o.expert; }
};

void pair_up(const double* load, const std::vector<int32_t>& count, Bins& bins) {
  std::vector<Replica> all;
  all.reserve(2 * bins.ranks);
  for (int e = 0; e < static_cast<int>(count.size()); ++e)
    for (int c = 0; c < count[e]; ++c) all.push_back({load[e] / count[e], e});
  std::sort(all.begin(), all.end());
  const int last = static_cast<int>(all.size()) - 1;
  for (int r = 0; r < bins.ranks; ++r) {
    if (all[r].expert == all[last - r].expert) {   // in the middle of the order only: trade partners with another rank
      for (int d = 1; d < bins.ranks; ++d) {
        const int s = (r + bins.ranks - d) % bins.ranks;
        if (all[s].expert == all[r].expert || all[last - s].expert == all[r].expert) continue;
        std::swap(all[r], all[s]);
        break;
      }
    }
  }
  for (int r = 0; r < bins.ranks; ++r) {
    bins.put(r, 0, all[last - r].expert, all[last - r].size);
    bins.put(r, 1, all[r].expert, all[r].size);
  }
}

}  // namespace

void place_pairs(const double* load, int experts, double enough, Bins& bins) {
  const int ranks = bins.ranks;
  std::vector<int32_t> count(experts), trial(experts);
  split_hottest(load, experts, 2 * ranks, ranks, count.data());
  const auto heaviest = [&](const std::vector<int32_t>& c) {
    Bins b;
    b.reset(ranks, 2);
    pair_up(load, c, b);
    return b.max_load();
  };
  double high = heaviest(count), low = enough;
  PairSearch search(load, experts, ranks);
  while (high > low * (1 + kPrecision)) {
    const double limit = std::sqrt(low * high);
    if (search.meet(limit, trial)) {
      const double got = heaviest(trial);
      if (got < high) count = trial;
      high = std::min(limit, got);
    } else {
      low = limit;
    }
  }
  bins.reset(ranks, 2);
  pair_up(load, count, bins);
}

}  // namespace moecomm::balance
