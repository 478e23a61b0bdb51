#include "balance/split.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace moecomm::balance {
namespace {

constexpr double kEnough = 1e-4;  // of the mean rank load: stop when four rounds gain less
constexpr double kBeyond = 1.6;   // over-relaxation: the step of an expert relative to its own optimum

}  // namespace

Pouring::Pouring(const Replicas& r, const double* load, const uint8_t* active)
    : r_(r),
      load_(load),
      rank_(r.rank),
      replica_(r.slot.size()),
      place_(r.slot.size()),
      share_(r.slot.size(), 0.0),
      running_(r.experts),
      rank_load_(r.ranks, 0.0),
      level_(r.ranks) {
  std::iota(replica_.begin(), replica_.end(), 0);
  std::iota(place_.begin(), place_.end(), 0);
  double total = 0.0;
  for (int e = 0; e < r.experts; ++e) {
    total += load[e];
    running_[e] = r.count(e);
    if (active) {
      running_[e] = 0;
      for (int i = r.first[e]; i < r.first[e + 1]; ++i)
        if (active[i]) start(i);
    } else if (running_[e] > 1) {
      choosing_.push_back(e);
    }
    if (running_[e] == 1) pour(e);
  }
  enough_ = kEnough * total / r.ranks;
  for (const int e : choosing_) pour(e);
}

void Pouring::start(int i) {
  const int e = r_.expert[i], at = place_[i], to = r_.first[e] + running_[e]++;
  std::swap(rank_[at], rank_[to]);
  std::swap(replica_[at], replica_[to]);
  place_[replica_[at]] = at;
  place_[replica_[to]] = to;
  if (running_[e] == 2) choosing_.push_back(e);
}

void Pouring::stop(int i) {
  const int e = r_.expert[i], at = place_[i], to = r_.first[e] + --running_[e];
  rank_load_[rank_[at]] -= share_[at];
  share_[at] = share_[to];
  share_[to] = 0.0;
  std::swap(rank_[at], rank_[to]);
  std::swap(replica_[at], replica_[to]);
  place_[replica_[at]] = at;
  place_[replica_[to]] = to;
  if (running_[e] == 1) choosing_.erase(std::find(choosing_.begin(), choosing_.end(), e));
}

void Pouring::pour(int e, double beyond) {
  const int n = running_[e];
  const int32_t* rank = rank_.data() + r_.first[e];
  double *share = share_.data() + r_.first[e], *level = level_.data(), sum = load_[e];
  for (int i = 0; i < n; ++i) sum += level[i] = rank_load_[rank[i]] - share[i];
  // The water level if it covers all ranks; ranks above it are removed until there are none.
  double height = n ? sum / n : 0.0;
  for (int covered = n;;) {
    sum = load_[e];
    int still = 0;
    for (int i = 0; i < n; ++i)
      if (level[i] < height) sum += level[i], ++still;
    if (still >= covered || still == 0) break;
    height = sum / still;
    covered = still;
  }
  if (beyond == 1.0) {
    for (int i = 0; i < n; ++i) {
      share[i] = std::max(0.0, height - level[i]);
      rank_load_[rank[i]] = level[i] + share[i];
    }
    return;
  }
  // A longer step in the same direction, limited so that no share becomes negative.
  double step = beyond;
  for (int i = 0; i < n; ++i) {
    const double change = std::max(0.0, height - level[i]) - share[i];
    if (share[i] + step * change < 0.0) step = share[i] / -change;
  }
  for (int i = 0; i < n; ++i) {
    share[i] = std::max(0.0, share[i] + step * (std::max(0.0, height - level[i]) - share[i]));
    rank_load_[rank[i]] = level[i] + share[i];
  }
}

// The same in closed form for two replicas that share all tokens of the expert, which is the most common
// case.
void Pouring::trade(int e, double beyond) {
  double* share = share_.data() + r_.first[e];
  double &a = rank_load_[rank_[r_.first[e]]], &b = rank_load_[rank_[r_.first[e] + 1]];
  const double moved = std::clamp(beyond * (b - a) / 2, -share[0], share[1]);
  share[0] += moved;
  share[1] -= moved;
  a += moved;
  b -= moved;
}

double Pouring::relax(int rounds) {
  double before = std::numeric_limits<double>::infinity();
  for (int round = 0; round < rounds; ++round) {
    const double beyond = round + 1 < rounds ? kBeyond : 1.0;  // the last round must not overshoot
    for (const int e : choosing_) running_[e] == 2 ? trade(e, beyond) : pour(e, beyond);
    if (round % 4 != 3) continue;
    const double most = *std::max_element(rank_load_.begin(), rank_load_.end());
    if (before - most < enough_) break;
    before = most;
  }
  return *std::max_element(rank_load_.begin(), rank_load_.end());
}

double split(const Replicas& r, const double* load, const uint8_t* active, int rounds, double* share) {
  Pouring pouring(r, load, active);  // pours every expert once
  const double most = pouring.relax(rounds - 1);
  for (size_t i = 0; i < r.slot.size(); ++i) share[i] = pouring.share(static_cast<int>(i));
  return most;
}

void runs(const Replicas& r, const int32_t* total, const double* share, int rotation, int32_t* from,
          int32_t* to) {
  for (int e = 0; e < r.experts; ++e) {
    const int begin = r.first[e], n = r.count(e);
    double poured = 0.0;
    int32_t taken = 0;
    int last = -1;  // the last replica with a share takes the rounding remainder
    for (int k = 0; k < n; ++k)
      if (share[begin + (e + rotation + k) % n] > 0) last = k;
    for (int k = 0; k < n; ++k) {
      const int i = begin + (e + rotation + k) % n;
      poured += share[i];
      from[i] = taken;
      taken = last < 0    ? 0
              : k >= last ? total[e]
                          : static_cast<int32_t>(std::clamp<int64_t>(std::llround(poured), taken, total[e]));
      to[i] = taken;
    }
  }
}

int32_t even_quota(const Replicas& r, int replica, int32_t count, const uint8_t* active, int rotation) {
  const int e = r.expert[replica], begin = r.first[e], n = r.count(e);
  if (active && !active[replica]) return 0;
  int usable = 0, before = 0;  // in rotated order: the first ones take the remainder
  for (int k = 0; k < n; ++k) {
    const int i = begin + (e + rotation + k) % n;
    if (i == replica) before = usable;
    usable += !active || active[i];
  }
  return count / usable + (before < count % usable);
}

}  // namespace moecomm::balance
