#include "balance/pairs.hpp"

#include <cmath>
#include <numeric>

#include "balance/counts.hpp"

namespace moecomm::balance {
namespace {

constexpr int kSteps = 512;          // resolution of the ledger: T / 1024
constexpr double kPrecision = 5e-4;  // of the bisection
constexpr int kLargeWorld = 32;      // ranks
constexpr int kWork = 1500;          // limits the replicas that move_replicas() examines

// For every step t: the surplus of small replicas over the large ones that need them. A negative value is a
// deficit.
class Ledger {
 public:
  void reset(double limit) {
    limit_ = limit;
    scale_ = 2 * kSteps / limit;
    std::fill(surplus_, surplus_ + kSteps, int16_t{0});
  }
  // The effect of adding (n > 0) or removing (n < 0) replicas of one size. Rounding may hide a small deficit,
  // so the caller checks the pairs themselves.
  struct Effect {
    int from;
    int n;
  };
  Effect effect(double size, int n) const {
    if (2 * size <= limit_) return {std::min(kSteps, static_cast<int>(size * scale_ + 0.5)), n};
    return {std::max(0, static_cast<int>((limit_ - size) * scale_ + 0.5)), -n};
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

enum class Found { yes, no, impossible };

class PairSearch {
 public:
  PairSearch(const double* load, const std::vector<int32_t>& by_load, int ranks)
      : load_(load), experts_(static_cast<int>(by_load.size())), ranks_(ranks), order_(by_load) {}

  // Searches counts that meet the limit, with each of the ways to choose splits. With many ranks one split
  // changes little, and the first way is nearly as good as all of them.
  Found meet(double limit, std::vector<int32_t>& count) {
    Found found = meet(limit, Order::either, count);
    for (const Order c : {Order::small_first, Order::small_unless_worse})
      if (found == Found::no && ranks_ <= kLargeWorld) found = meet(limit, c, count);
    return found;
  }

 private:
  // Which splits are considered: those of large and of small replicas; only the small ones, if there are any;
  // or both, but a large one must be clearly better.
  enum class Order { either, small_first, small_unless_worse };

  Found meet(double limit, Order order, std::vector<int32_t>& count) {
    int left = 2 * ranks_;
    for (int e = 0; e < experts_; ++e) {
      const double n = std::max(1.0, std::ceil(load_[e] / limit));
      if (n > ranks_) return Found::impossible;
      count[e] = static_cast<int32_t>(n);
      left -= count[e];
    }
    if (left < 0) return Found::impossible;
    ledger_.reset(limit);
    for (int e = 0; e < experts_; ++e) ledger_.add(ledger_.effect(load_[e] / count[e], count[e]));
    for (int step; (step = ledger_.first_deficit()) < kSteps; --left) {
      if (left == 0) return Found::no;
      const int e = best_split(step, limit, order, count);
      if (e < 0) return Found::no;
      ledger_.add(ledger_.effect(load_[e] / count[e], -count[e]));
      ++count[e];
      ledger_.add(ledger_.effect(load_[e] / count[e], count[e]));
    }
    // The remaining slots get small replicas of cold experts, which can only help as partners.
    for (int i = 0; left > 0; i = (i + 1) % experts_)
      if (count[order_[i]] < ranks_) {
        ++count[order_[i]];
        --left;
      }
    return Found::yes;
  }

  // Of the splits that help at this step, the one that leaves the smallest total deficit.
  int best_split(int step, double limit, Order order, const std::vector<int32_t>& count) const {
    int best = -1;
    double least = 1e300;
    const auto consider = [&](int e, double handicap) {
      if (count[e] >= ranks_) return;
      const double d =
          handicap * ledger_.deficit_with(ledger_.effect(load_[e] / count[e], -count[e]),
                                          ledger_.effect(load_[e] / (count[e] + 1), count[e] + 1));
      if (d < least) least = d, best = e;
    };
    // The largest of those whose halves become partners ...
    const double t = ledger_.at(step), large = limit - ledger_.at(step + 1);
    const auto above =
        std::partition_point(order_.begin(), order_.end(), [&](int e) { return load_[e] <= 2 * t; });
    int seen = 0;
    for (auto it = above; it != order_.begin() && seen < kSmall;) {
      const int e = *--it;
      if (count[e] == 1) consider(e, 1.0), ++seen;
    }
    if (order == Order::small_first && best >= 0) return best;
    // ... and large replicas that find no partner.
    seen = 0;
    for (int i = experts_ - 1; i >= 0 && seen < kLarge; --i) {
      const int e = order_[i];
      if (load_[e] < large) break;
      if (load_[e] / count[e] >= large) consider(e, order == Order::either ? 1.0 : kClearly), ++seen;
    }
    return best;
  }

  static constexpr int kLarge = 3, kSmall = 4;
  static constexpr double kClearly = 1.15;
  const double* load_;
  int experts_, ranks_;
  const std::vector<int32_t>& order_;  // experts by load
  Ledger ledger_;
};

struct Replica {
  double size;
  int32_t expert;
  bool operator<(const Replica& o) const { return size != o.size ? size < o.size : expert < o.expert; }
};

// All replicas in order: rank r takes those at r and at size - 1 - r, so the smallest with the largest, and
// no expert twice. Only the split experts need sorting; the others are already ordered by load.
std::vector<Replica> arrange(const double* load, const std::vector<int32_t>& by_load,
                             const std::vector<int32_t>& count) {
  std::vector<Replica> split, all;
  for (const int32_t e : by_load)
    if (count[e] > 1) split.push_back({load[e] / count[e], e});
  std::sort(split.begin(), split.end());
  auto next = split.begin();
  const auto take_split = [&] {
    all.insert(all.end(), count[next->expert], *next);
    ++next;
  };
  for (const int32_t e : by_load) {
    if (count[e] > 1) continue;
    const Replica whole{load[e], e};
    while (next != split.end() && *next < whole) take_split();
    all.push_back(whole);
  }
  while (next != split.end()) take_split();
  const int last = static_cast<int>(all.size()) - 1, ranks = (last + 1) / 2;
  for (int r = 0; r < ranks; ++r) {
    const int32_t twice = all[r].expert;
    if (twice != all[last - r].expert) continue;
    // Trade the smaller one with the rank for which this costs least.
    int with = -1;
    double least = 1e300;
    for (int s = 0; s < ranks; ++s) {
      if (all[s].expert == twice || all[last - s].expert == twice) continue;
      const double worst = std::max(all[s].size + all[last - r].size, all[r].size + all[last - s].size);
      if (worst < least) least = worst, with = s;
    }
    std::swap(all[r], all[with]);  // it exists: if a rank has an expert twice, another rank does not have it
  }
  return all;
}

// The position of the smaller replica of the heaviest pair.
int heaviest_pair(const std::vector<Replica>& all) {
  const int last = static_cast<int>(all.size()) - 1;
  int worst = 0;
  for (int i = 1; 2 * i < last; ++i)
    if (all[i].size + all[last - i].size > all[worst].size + all[last - worst].size) worst = i;
  return worst;
}

double heaviest(const std::vector<Replica>& all) {
  const int i = heaviest_pair(all);
  return all[i].size + all[all.size() - 1 - i].size;
}

// Moves one replica from an expert that can spare it to an expert that reduces the heaviest pair, as long as
// this helps. It finds improvements that the greedy choice of splits has missed.
void move_replicas(const double* load, const std::vector<int32_t>& by_load, int ranks, double enough,
                   std::vector<int32_t>& count) {
  std::vector<Replica> all = arrange(load, by_load, count);
  double now = heaviest(all);
  const int most = kWork / (2 * ranks);
  for (int tries = 0; now > enough && tries < most;) {
    const int i = heaviest_pair(all);
    const Replica small = all[i], large = all[all.size() - 1 - i];
    std::vector<Replica> takers, givers;  // by size after the move: smallest first
    for (int e = 0; e < static_cast<int>(count.size()); ++e) {
      if (count[e] < ranks && (e == large.expert || load[e] / (count[e] + 1) <= small.size))
        takers.push_back({-load[e] / (count[e] + 1), e});
      if (count[e] > 1 && load[e] / (count[e] - 1) < now) givers.push_back({load[e] / (count[e] - 1), e});
    }
    std::sort(takers.begin(), takers.end());
    std::sort(givers.begin(), givers.end());
    bool better = false;
    for (size_t sum = 0; sum < takers.size() + givers.size() && !better && tries < most; ++sum)
      for (size_t i = sum < givers.size() ? 0 : sum - givers.size() + 1;
           i <= sum && i < takers.size() && !better && tries < most; ++i) {
        const int to = takers[i].expert, from = givers[sum - i].expert;
        if (to == from) continue;
        ++count[to];
        --count[from];
        ++tries;
        std::vector<Replica> trial = arrange(load, by_load, count);
        const double then = heaviest(trial);
        better = then < now;
        if (better) {
          now = then;
          all.swap(trial);
        } else {
          --count[to];
          ++count[from];
        }
      }
    if (!better) return;
  }
}

}  // namespace

void place_pairs(const double* load, int experts, double enough, Bins& bins) {
  const int ranks = bins.ranks;
  std::vector<int32_t> count(experts), trial(experts), by_load(experts);
  std::iota(by_load.begin(), by_load.end(), 0);
  std::sort(by_load.begin(), by_load.end(),
            [&](int a, int b) { return load[a] != load[b] ? load[a] < load[b] : a < b; });
  split_hottest(load, experts, 2 * ranks, ranks, count.data());
  double high = heaviest(arrange(load, by_load, count)), low = enough;
  // Limits at which the necessary splits alone need more than all slots are impossible: a proven lower bound.
  bool proven = true;
  PairSearch search(load, by_load, ranks);
  while (high > low * (1 + kPrecision)) {
    const double limit = low > 0 ? std::sqrt(low * high) : high / 2;
    const Found found = search.meet(limit, trial);
    const double got = found == Found::yes ? heaviest(arrange(load, by_load, trial)) : high;
    if (got < high) count = trial, high = got;
    if (found == Found::yes && got <= limit) continue;
    low = limit;
    proven = found == Found::impossible;
  }
  if (!proven) move_replicas(load, by_load, ranks, enough, count);
  bins.reset(ranks, 2);
  const std::vector<Replica> all = arrange(load, by_load, count);
  for (int r = 0; r < ranks; ++r) {
    const Replica &small = all[r], &large = all[2 * ranks - 1 - r];
    bins.put(r, 0, large.expert, large.size);
    bins.put(r, 1, small.expert, small.size);
  }
}

}  // namespace moecomm::balance
