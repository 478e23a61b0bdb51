#include "balance/exchange.hpp"

#include <cmath>
#include <numeric>

namespace moecomm::balance {
namespace {

// An expert whose replicas are larger than this part of the mean rank load may get another replica.
constexpr double kHot = 0.9;

struct Held {
  double size;
  int32_t expert;
};

// One round: which replica every rank gives up, and which one it gets.
class Round {
 public:
  Round(Bins& bins, double mean)
      : b_(bins), mean_(mean), given_(bins.ranks), locked_(bins.ranks, 0), pool_(bins.ranks) {}

  // Rank r gives up this slot, and `replaced` goes into the pool instead of its replica.
  void lock(int r, int slot, Held replaced) {
    given_[r] = slot;
    pool_[r] = replaced;
    locked_[r] = 1;
  }
  bool locked(int r) const { return locked_[r]; }

  void choose(double enough) {
    const double usual =
        std::accumulate(b_.size.begin(), b_.size.end(), 0.0) / static_cast<double>(b_.size.size());
    for (int r = 0; r < b_.ranks; ++r) {
      if (locked_[r]) continue;
      int best = 0;
      for (int i = 1; i < b_.slots; ++i)
        if (std::abs(size(r, i) - usual - (b_.load[r] - mean_)) <
            std::abs(size(r, best) - usual - (b_.load[r] - mean_)))
          best = i;
      give(r, best);
    }
    sort_all();
    Score now = score();
    for (bool better = true; better && now.max > enough;) {
      better = false;
      for (int r = 0; r < b_.ranks; ++r) {
        if (locked_[r]) continue;
        int best = given_[r];
        for (int i = 0; i < b_.slots; ++i) {
          if (i == given_[r]) continue;
          give_sorted(r, i);
          const Score then = score();
          if (then.sum < now.sum) {
            now = then;
            best = i;
            better = true;
          }
        }
        if (given_[r] != best) give_sorted(r, best);
      }
    }
  }

  void redistribute() {
    const int n = b_.ranks;
    std::vector<int> ranks(n), items(n);
    std::iota(ranks.begin(), ranks.end(), 0);
    std::iota(items.begin(), items.end(), 0);
    std::stable_sort(ranks.begin(), ranks.end(), [&](int a, int c) { return rest(a) < rest(c); });
    std::stable_sort(items.begin(), items.end(), [&](int a, int c) { return pool_[a].size > pool_[c].size; });
    const auto clash = [&](int at, int item) {
      const int r = ranks[at];
      for (int i = 0; i < b_.slots; ++i)
        if (i != given_[r] && b_.expert[static_cast<size_t>(r) * b_.slots + i] == pool_[item].expert)
          return true;
      return false;
    };
    // A rank must not get an expert that it holds: trade with the replica of the nearest size that fits both
    // ranks.
    for (int i = 0; i < n; ++i) {
      if (!clash(i, items[i])) continue;
      bool traded = false;
      for (int d = 1; d < n && !traded; ++d)
        for (const int j : {i - d, i + d}) {
          if (j < 0 || j >= n || clash(i, items[j]) || clash(j, items[i])) continue;
          std::swap(items[i], items[j]);
          traded = true;
          break;
        }
      if (!traded) {
        failed_ = true;
        return;
      }
    }
    for (int i = 0; i < n; ++i) {
      const Held& h = pool_[items[i]];
      b_.put(ranks[i], given_[ranks[i]], h.expert, h.size);
    }
  }
  bool failed() const { return failed_; }

 private:
  struct Score {
    double max, sum;
  };
  double size(int r, int i) const { return b_.size[static_cast<size_t>(r) * b_.slots + i]; }
  double rest(int r) const { return b_.load[r] - size(r, given_[r]); }
  void give(int r, int i) {
    given_[r] = i;
    pool_[r] = {size(r, i), b_.expert[static_cast<size_t>(r) * b_.slots + i]};
  }
  // The same, keeping rests_ and sizes_ sorted. The loads after the redistribution are their element-wise
  // sums.
  void give_sorted(int r, int i) {
    const double rest_before = rest(r), size_before = pool_[r].size;
    give(r, i);
    replace(rests_, rest_before, rest(r));
    replace(sizes_, -size_before, -pool_[r].size);
  }
  void sort_all() {
    rests_.resize(b_.ranks);
    sizes_.resize(b_.ranks);
    for (int r = 0; r < b_.ranks; ++r) {
      rests_[r] = rest(r);
      sizes_[r] = -pool_[r].size;  // negative: ascending order puts the largest first
    }
    std::sort(rests_.begin(), rests_.end());
    std::sort(sizes_.begin(), sizes_.end());
  }
  static void replace(std::vector<double>& sorted, double from, double to) {
    auto at = std::lower_bound(sorted.begin(), sorted.end(), from);
    for (; at + 1 != sorted.end() && at[1] < to; ++at) *at = at[1];
    for (; at != sorted.begin() && at[-1] > to; --at) *at = at[-1];
    *at = to;
  }
  // The quality of the redistribution: the heaviest rank, and a sum that emphasizes heavy ranks.
  Score score() const {
    constexpr int kLanes = 4;  // independent sums, so that an addition does not wait for the previous one
    double most[kLanes] = {}, sum[kLanes] = {};
    const double per_mean = 1 / mean_;
    const auto add = [&](int i, int lane) {
      const double carried = rests_[i] - sizes_[i];
      const double over = std::max(0.0, carried * per_mean - 1);
      most[lane] = std::max(most[lane], carried);
      sum[lane] += over * over * over;
    };
    int i = 0;
    for (; i + kLanes <= b_.ranks; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
    for (; i < b_.ranks; ++i) add(i, 0);
    const Score s{std::max(std::max(most[0], most[1]), std::max(most[2], most[3])),
                  (sum[0] + sum[1]) + (sum[2] + sum[3])};
    return s;
  }

  Bins& b_;
  double mean_;
  std::vector<int> given_;
  std::vector<char> locked_;
  std::vector<Held> pool_;
  std::vector<double> rests_, sizes_;
  bool failed_ = false;
};

}  // namespace

void improve_by_moves(const double* load, int experts, int rounds, double enough, Bins& b) {
  std::vector<int32_t> count(experts, 0);
  for (const int32_t e : b.expert) ++count[e];
  const double mean = std::accumulate(load, load + experts, 0.0) / b.ranks;
  const auto resize = [&] {
    std::fill(b.load.begin(), b.load.end(), 0.0);
    for (size_t i = 0; i < b.expert.size(); ++i) {
      b.size[i] = load[b.expert[i]] / count[b.expert[i]];
      b.load[i / b.slots] += b.size[i];
    }
  };
  resize();
  for (int k = 0; k < rounds && b.max_load() > enough; ++k) {
    const Bins before = b;
    Round round(b, mean);
    struct Swap {
      int rank, slot;
      int32_t to;
    };
    std::vector<Swap> swaps;
    for (int tries = 0; tries < b.ranks; ++tries) {
      int hot = 0, spare = -1;
      for (int e = 1; e < experts; ++e)
        if (load[e] / count[e] > load[hot] / count[hot]) hot = e;
      if (load[hot] / count[hot] <= kHot * mean || count[hot] >= b.ranks) break;
      for (int e = 0; e < experts; ++e)
        if (e != hot && count[e] > 1 &&
            (spare < 0 || load[e] / (count[e] - 1) < load[spare] / (count[spare] - 1)))
          spare = e;
      if (spare < 0 || load[spare] / (count[spare] - 1) >= load[hot] / count[hot]) break;
      int from = -1, slot = 0;
      for (int r = 0; r < b.ranks; ++r) {
        if (std::any_of(swaps.begin(), swaps.end(), [&](const Swap& s) { return s.rank == r; })) continue;
        for (int i = 0; i < b.slots; ++i)
          if (b.expert[static_cast<size_t>(r) * b.slots + i] == spare &&
              (from < 0 || b.load[r] > b.load[from]))
            from = r, slot = i;
      }
      if (from < 0) break;
      --count[spare];
      ++count[hot];
      swaps.push_back({from, slot, hot});
      resize();
    }
    for (const Swap& s : swaps) round.lock(s.rank, s.slot, {load[s.to] / count[s.to], s.to});
    round.choose(enough);
    round.redistribute();
    if (round.failed() || b.max_load() >= before.max_load()) {
      b = before;
      return;
    }
  }
}

}  // namespace moecomm::balance
