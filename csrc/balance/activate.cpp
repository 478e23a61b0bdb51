#include "balance/activate.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "balance/forest.hpp"
#include "balance/scale.hpp"
#include "balance/split.hpp"

namespace moecomm::balance {
namespace {

constexpr double kPiece = 0.95;    // of the mean rank load: the largest replica that an expert starts with
constexpr double kEnough = 1.004;  // heaviest rank over mean: below it no further step is made
constexpr double kTied = 2e-3;     // ranks within this part of the heaviest are treated as heaviest
constexpr int kSteps = 40;
constexpr int kAttempts = 20;  // of Forest::fit()
constexpr int kRounds = 4;     // of the split, between steps

class Activation {
 public:
  Activation(const Replicas& r, const double* load, int limit, uint8_t* active)
      : r_(r),
        load_(load),
        limit_(limit),
        active_(active),
        used_(r.ranks, 0),
        running_(r.experts, 0),
        level_(r.ranks, 0.0),
        share_(r.slot.size()),
        barred_(r.slot.size(), 0),
        spare_(r.ranks) {
    std::fill(active_, active_ + r.slot.size(), uint8_t{0});
    mean_ = std::accumulate(load, load + r.experts, 0.0) / r.ranks;
  }

  // Starts replicas, hot experts first, each on the lightest rank with room. Returns -1, or an expert without
  // room.
  int start() {
    std::vector<int> order;
    for (int e = 0; e < r_.experts; ++e)
      if (load_[e] > 0 && r_.count(e) > 0) order.push_back(e);
    std::sort(order.begin(), order.end(),
              [&](int a, int b) { return load_[a] != load_[b] ? load_[a] > load_[b] : a < b; });
    for (const int e : order)
      if (!run(best_idle(e), load_[e]) && !make_room(e)) return e;
    // Every expert runs now; hot experts get more replicas while there is room.
    for (const int e : order) {
      const int pieces = std::min<double>(r_.count(e), std::ceil(load_[e] / (kPiece * mean_)));
      for (int n = 1; n < pieces && run(best_idle(e), load_[e] / pieces); ++n) {}
    }
    return -1;
  }

  // An alternative start: balances the ranks with all replicas, and keeps as few of them as still balance the
  // ranks (forest.hpp). If a rank then runs too many, those with the smallest shares stop. The result is
  // dropped if a rank has too many experts that run nowhere else.
  void prune() {
    split(r_, load_, nullptr, kRounds, share_.data());
    Forest forest(r_, share_.data());
    forest.prune();
    forest.fit(limit_, kAttempts);
    std::vector<uint8_t> active(share_.size());
    std::vector<int> used(r_.ranks, 0), running(r_.experts, 0);
    for (size_t i = 0; i < share_.size(); ++i) {
      active[i] = forest.runs(static_cast<int>(i));
      used[r_.rank[i]] += active[i];
      running[r_.expert[i]] += active[i];
    }
    for (int rank = 0; rank < r_.ranks; ++rank)
      for (; used[rank] > limit_; --used[rank]) {
        int least = -1;
        for (int s = rank * r_.slots_per_rank(); s < (rank + 1) * r_.slots_per_rank(); ++s) {
          const int i = r_.at_slot[s];
          if (active[i] && running[r_.expert[i]] > 1 && (least < 0 || share_[i] < share_[least])) least = i;
        }
        if (least < 0) return;
        active[least] = 0;
        --running[r_.expert[least]];
      }
    for (int e = 0; e < r_.experts; ++e)
      if (running_[e] > 0 && running[e] == 0) return;  // a load so small that rounding removed it
    std::copy(active.begin(), active.end(), active_);
    used_.swap(used);
    running_.swap(running);
  }

  void improve() {
    std::vector<uint8_t> best;
    double least = 1e300, before = 1e300;
    Step last{0.0};
    Pouring pouring(r_, load_, active_);
    pouring.relax(kRounds);
    for (int step = 0; step <= kSteps; ++step) {
      const double most = pouring.relax(kRounds);
      if (most < least) {
        least = most;
        best.assign(active_, active_ + share_.size());
      }
      if (most <= kEnough * mean_ || step == kSteps) break;
      level_ = pouring.rank_load();
      const double squares = std::inner_product(level_.begin(), level_.end(), level_.begin(), 0.0);
      if (squares >= before) {  // the estimate was wrong: undo the step and do not try it again
        barred_[last.starts] = 1;
        take({0.0, last.stops, last.starts, last.stops_too, last.starts_too}, pouring);
        before = 1e300;
        continue;
      }
      before = squares;
      for (size_t i = 0; i < share_.size(); ++i) share_[i] = pouring.share(static_cast<int>(i));
      find_spares();
      last = best_step(most);
      if (last.starts < 0) break;
      take(last, pouring);
    }
    std::copy(best.begin(), best.end(), active_);
  }

 private:
  struct Step {
    double gain;  // estimated decrease of the sum of squared rank loads
    int starts = -1, stops = -1, starts_too = -1, stops_too = -1;
  };

  int best_idle(int e) const {
    int best = -1;
    for (int i = r_.first[e]; i < r_.first[e + 1]; ++i)
      if (!active_[i] && used_[r_.rank[i]] < limit_ &&
          (best < 0 || level_[r_.rank[i]] < level_[r_.rank[best]]))
        best = i;
    return best;
  }
  bool run(int i, double amount) {
    if (i < 0) return false;
    active_[i] = 1;
    ++running_[r_.expert[i]];
    ++used_[r_.rank[i]];
    level_[r_.rank[i]] += amount;
    return true;
  }
  void stop(int i) {
    active_[i] = 0;
    --running_[r_.expert[i]];
    --used_[r_.rank[i]];
  }
  int running(int e) const { return running_[e]; }

  // All ranks of e are full. Searches a shortest chain of ranks, along which every rank passes one expert on
  // to another rank that hosts it, until a rank has room. Without such a chain no choice of replicas exists.
  bool make_room(int e) {
    // By rank: the replica that stops so that this rank gets one, and the replica that starts here.
    std::vector<int> passes(r_.ranks, -1), gets(r_.ranks, -1), queue;
    std::vector<char> seen(r_.ranks, 0);
    for (int i = r_.first[e]; i < r_.first[e + 1]; ++i) {
      seen[r_.rank[i]] = 1;
      gets[r_.rank[i]] = i;
      queue.push_back(r_.rank[i]);
    }
    std::vector<int> from(r_.ranks, -1);
    for (size_t k = 0; k < queue.size(); ++k) {
      const int rank = queue[k];
      for (int s = rank * r_.slots_per_rank(); s < (rank + 1) * r_.slots_per_rank(); ++s) {
        const int i = r_.at_slot[s], f = r_.expert[i];
        if (!active_[i]) continue;
        for (int j = r_.first[f]; j < r_.first[f + 1]; ++j) {
          const int to = r_.rank[j];
          if (active_[j] || seen[to]) continue;
          seen[to] = 1;
          gets[to] = j;
          passes[to] = i;
          from[to] = rank;
          if (used_[to] >= limit_) {
            queue.push_back(to);
            continue;
          }
          for (int at = to; at >= 0; at = from[at]) {
            const double amount = load_[r_.expert[gets[at]]];
            run(gets[at], amount);
            if (passes[at] >= 0) {
              stop(passes[at]);
              level_[from[at]] -= amount;
            }
          }
          return true;
        }
      }
    }
    return false;
  }

  void take(const Step& s, Pouring& pouring) {
    for (const int i : {s.stops, s.stops_too})
      if (i >= 0) stop(i), pouring.stop(i);
    for (const int i : {s.starts, s.starts_too})
      if (i >= 0) run(i, 0.0), pouring.start(i);
    for (const int i : {s.starts, s.stops, s.starts_too, s.stops_too})
      if (i >= 0) pouring.pour(r_.expert[i]);
  }

  // Ranks that share experts are equally heavy, so relieving any of the heaviest ranks relieves all of them.
  Step best_step(double most) const {
    Step best{1e-9 * mean_ * mean_};
    for (int h = 0; h < r_.ranks; ++h) {
      if (level_[h] < most * (1 - kTied)) continue;
      for (int s = h * r_.slots_per_rank(); s < (h + 1) * r_.slots_per_rank(); ++s) {
        const int i = r_.at_slot[s], e = r_.expert[i];
        if (!active_[i] || share_[i] <= 0) continue;
        for (int j = r_.first[e]; j < r_.first[e + 1]; ++j) {
          const int to = r_.rank[j];
          if (active_[j] || barred_[j] || level_[to] >= level_[h]) continue;
          if (used_[to] < limit_)
            consider(best, {gain(h, to, std::min(share_[i], (level_[h] - level_[to]) / 2)), j});
          else
            consider_trades(best, h, i, j);
        }
      }
    }
    return best;
  }

  // The gain of moving load from one rank to another.
  double gain(int from, int to, double moved) const {
    return 2 * moved * (level_[from] - level_[to] - moved);
  }

  // Rank `to` of replica j is full, so one of its replicas, k, must stop. Its expert runs elsewhere already,
  // or starts on h in exchange for i, or starts on a third rank that has room or stops a replica it can
  // spare.
  void consider_trades(Step& best, int h, int i, int j) const {
    const int to = r_.rank[j];
    for (int s = to * r_.slots_per_rank(); s < (to + 1) * r_.slots_per_rank(); ++s) {
      const int k = r_.at_slot[s], f = r_.expert[k];
      if (!active_[k]) continue;
      const double freed = level_[to] - share_[k],
                   moved = std::clamp((level_[h] - freed) / 2, 0.0, share_[i]);
      const double relief = 2 * moved * (level_[h] - freed - moved);  // without the share of k
      if (running(f) > 1) {
        consider(best, {relief - cost_of_stopping(k), j, k});
        continue;
      }
      for (int x = r_.first[f]; x < r_.first[f + 1]; ++x) {
        const int third = r_.rank[x];
        if (active_[x] || barred_[x] || third == to) continue;
        if (third == h && running(r_.expert[i]) == 1)
          consider(best, {gain(h, to, share_[i] - share_[k]), j, k, x, i});
        if (third == h) continue;
        if (used_[third] < limit_)
          consider(best, {relief + gain(to, third, share_[k]), j, k, x});
        else if (const int y = spare_[third]; y >= 0)
          consider(best, {relief + gain(to, third, share_[k]) - cost_of_stopping(y), j, k, x, y});
      }
    }
  }
  // The cost of stopping k: its share goes to the other replicas of its expert.
  double cost_of_stopping(int k) const {
    const int f = r_.expert[k], others = running(f) - 1;
    double cost = 0.0;
    for (int x = r_.first[f]; x < r_.first[f + 1]; ++x)
      if (active_[x] && x != k) cost -= gain(r_.rank[k], r_.rank[x], share_[k] / others);
    return cost;
  }
  // For every rank, the replica with the smallest share among those whose expert runs elsewhere too.
  void find_spares() {
    std::fill(spare_.begin(), spare_.end(), -1);
    for (size_t i = 0; i < share_.size(); ++i) {
      int& spare = spare_[r_.rank[i]];
      if (active_[i] && (spare < 0 || share_[i] < share_[spare]) && running(r_.expert[i]) > 1)
        spare = static_cast<int>(i);
    }
  }
  static void consider(Step& best, const Step& step) {
    if (step.gain > best.gain) best = step;
  }

  const Replicas& r_;
  const double* load_;
  int limit_;
  uint8_t* active_;
  std::vector<int> used_, running_;
  std::vector<double> level_, share_;
  std::vector<char> barred_;
  std::vector<int> spare_;
  double mean_ = 0.0;
};

}  // namespace

int activate(const Replicas& r, const double* load, int limit, uint8_t* active) {
  const std::vector<double> scaled = scaled_loads(load, r.experts);
  Activation a(r, scaled.data(), limit, active);
  if (const int e = a.start(); e >= 0) return e;
  a.prune();
  a.improve();
  return -1;
}

}  // namespace moecomm::balance
