#include "balance/replica_policy.hpp"

#include <algorithm>

#include "balance/activate.hpp"
#include "balance/route.hpp"
#include "balance/split.hpp"

namespace moecomm::balance {
namespace {

constexpr int kRounds = 24;  // of split()

}  // namespace

ReplicaPolicy::ReplicaPolicy(const int32_t* physical_to_logical, int slots, int experts, int ranks, int nodes,
                             Mode mode, int activate)
    : r_(physical_to_logical, slots, experts, ranks, nodes), mode_(mode), activate_(activate) {}

ReplicaPolicy::Solved ReplicaPolicy::solve(const int32_t* total, int32_t rotation) const {
  Solved s;
  s.rotation = rotation;
  if (!needs_all()) return s;
  const std::vector<double> load(total, total + r_.experts);
  if (activate_ > 0) {
    s.active.resize(r_.slots);
    activate(r_, load.data(), activate_, s.active.data());
  }
  if (mode_ == Mode::optimal) {
    std::vector<double> share(r_.slots);
    split(r_, load.data(), s.active.empty() ? nullptr : s.active.data(), kRounds, share.data());
    s.from.resize(r_.slots);
    s.to.resize(r_.slots);
    runs(r_, total, share.data(), rotation, s.from.data(), s.to.data());
  }
  return s;
}

int32_t ReplicaPolicy::rows(const Solved& s, int source, const int32_t* before, const int32_t* counts,
                            int slot) const {
  const int i = r_.at_slot[slot], e = r_.expert[i];
  if (mode_ == Mode::even)
    return even_quota(r_, i, counts[e], s.active.empty() ? nullptr : s.active.data(), s.rotation + source);
  return std::max(0, std::min(before[e] + counts[e], s.to[i]) - std::max(before[e], s.from[i]));
}

void ReplicaPolicy::route(const Solved& s, const Batch& b, int rank, const int32_t* before,
                          int64_t* physical) const {
  const int own_node = rank / (r_.ranks / r_.nodes);
  if (mode_ == Mode::local)
    return route_locally(r_, b.ids, b.tokens, b.top_k, own_node, s.active.empty() ? nullptr : s.active.data(),
                         s.rotation + rank, physical);
  std::vector<int32_t> quota(r_.slots);
  for (int i = 0; i < r_.slots; ++i) quota[i] = rows(s, rank, before, b.counts, r_.slot[i]);
  route_by_quota(r_, b.ids, b.tokens, b.top_k, own_node, quota.data(), physical);
}

}  // namespace moecomm::balance
