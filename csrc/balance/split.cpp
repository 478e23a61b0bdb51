#include "balance/split.hpp"

#include <algorithm>
#include <cmath>

namespace moecomm::balance {
namespace {

constexpr double kEnough = 1e-4;   // of the mean rank load: four rounds that gain less are the last

// Pours `amount` over n ranks: raises the lowest levels to a common one. level[n] is sorted along with `at`.
void pour_over(double amount, double* level, int* at, int n, double* rank_load, double* share, const int32_t* rank) {
  for (int i = 1; i < n; ++i) {
    const double l = level[i];
    const int a = at[i];
    int j = i;
    for (; j > 0 && level[j - 1] > l; --j) level[j] = level[j - 1], at[j] = at[j - 1];
    level[j] = l;
    at[j] = a;
  }
  double sum = level[0];
  int filled = 1;
  while (filled < n && amount + sum > level[filled] * filled) sum += level[filled++];
  const double height = (amount + sum) / filled;
  for (int i = 0; i < n; ++i) {
    share[at[i]] = i < filled ? std::max(0.0, height - level[i]) : 0.0;
    rank_load[rank[at[i]]] = level[i] + share[at[i]];
  }
}

}  // namespace

Pouring::Pouring(const Replicas& r, const double* load, const uint8_t* active, double* share)
    : r_(r), load_(load), active_(active), share_(share), rank_load_(r.ranks, 0.0), level_(r.ranks), at_(r.ranks) {
  double total = 0.0;
  std::fill(share, share + r.slot.size(), 0.0);
  for (int e = 0; e < r.experts; ++e) {
    total += load[e];
    if (r.count(e) == 1) pour(e);
  }
  enough_ = kEnough * total / r.ranks;
  for (const int e : r.shared) pour(e);
}

void Pouring::pour(int e) {
  int n = 0;
  for (int i = r_.first[e]; i < r_.first[e + 1]; ++i) {
    double& level = rank_load_[r_.rank[i]];
    level -= share_[i];
    share_[i] = 0.0;
    if (active_ && !active_[i]) continue;
    level_[n] = level;
    at_[n++] = i;
  }
  if (n == 1) {
    share_[at_[0]] = load_[e];
    rank_load_[r_.rank[at_[0]]] += load_[e];
  } else if (n > 1) {
    pour_over(load_[e], level_.data(), at_.data(), n, rank_load_.data(), share_, r_.rank.data());
  }
}

double Pouring::settle(int rounds) {
  double before = 1e300;
  for (int round = 0; round < rounds; ++round) {
    for (const int e : r_.shared) pour(e);
    if (round % 4 != 3) continue;
    const double most = *std::max_element(rank_load_.begin(), rank_load_.end());
    if (before - most < enough_) break;
    before = most;
  }
  return *std::max_element(rank_load_.begin(), rank_load_.end());
}

double split(const Replicas& r, const double* load, const uint8_t* active, int rounds, double* share) {
  return Pouring(r, load, active, share).settle(rounds - 1);   // to begin with, everything has been poured once
}

void quotas_of_source(const Replicas& r, const int32_t* counts, int sources, int source, const double* share, int turn, int32_t* quota) {
  for (int e = 0; e < r.experts; ++e) {
    const int begin = r.first[e], n = r.count(e);
    int64_t mine = 0, total = 0;   // the run of this source: [mine, end)
    for (int s = 0; s < sources; ++s) {
      if (s == source) mine = total;
      total += counts[static_cast<int64_t>(s) * r.experts + e];
    }
    const int64_t end = mine + counts[static_cast<int64_t>(source) * r.experts + e];
    double poured = 0.0;
    int64_t from = 0;
    int last = -1;                 // the last replica with a share takes what rounding leaves
    for (int k = 0; k < n; ++k)
      if (share[begin + (e + turn + k) % n] > 0) last = k;
    for (int k = 0; k < n; ++k) {
      const int i = begin + (e + turn + k) % n;
      poured += share[i];
      const int64_t to = k >= last ? total : std::clamp<int64_t>(std::llround(poured), from, total);
      quota[i] = last < 0 ? 0 : static_cast<int32_t>(std::max<int64_t>(0, std::min(end, to) - std::max(mine, from)));
      from = to;
    }
  }
}

void even_quotas(const Replicas& r, const int32_t* counts, const uint8_t* active, int turn, int32_t* quota) {
  for (int e = 0; e < r.experts; ++e) {
    const int begin = r.first[e], n = r.count(e);
    int usable = 0;
    for (int i = begin; i < begin + n; ++i) usable += !active || active[i];
    for (int k = 0, left = counts[e]; k < n; ++k) {
      const int i = begin + (e + turn + k) % n;
      quota[i] = 0;
      if (active && !active[i]) continue;
      quota[i] = (left + usable - 1) / usable;   // what does not divide goes to the first in turn
      left -= quota[i];
      --usable;
    }
  }
}

}  // namespace moecomm::balance
