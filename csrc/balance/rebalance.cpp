#include "balance/rebalance.hpp"

#include <cmath>
#include <numeric>
#include <vector>

#include "balance/counts.hpp"
#include "balance/exchange.hpp"
#include "balance/pack.hpp"
#include "balance/pairs.hpp"
#include "balance/relabel.hpp"
#include "balance/scale.hpp"

namespace moecomm::balance {
namespace {

// A rank that exceeds the best possible load by less than this part needs no further swap.
constexpr double kClose = 4e-4;
// If a rank exceeds it by more than this part, other replica counts are tried.
constexpr double kFar = 1e-3;
constexpr int kTries = 24;  // packings with other replica counts

// Assigns groups to nodes: equally many to each, with swaps to make the heaviest node light.
void groups_to_nodes(const Grid& g, const double* load, std::vector<std::vector<int32_t>>& groups_of) {
  const int per_group = g.experts / g.groups;
  std::vector<double> weight(g.groups);
  for (int i = 0; i < g.groups; ++i)
    weight[i] = std::accumulate(load + i * per_group, load + (i + 1) * per_group, 0.0);
  std::vector<int32_t> once(g.groups, 1);
  Bins nodes;
  nodes.reset(g.nodes, g.groups / g.nodes);
  pack_largest_first(weight.data(), once.data(), g.groups, nodes);
  swap_down(nodes, 0.0);
  for (int n = 0; n < g.nodes; ++n) {
    groups_of[n].assign(nodes.expert.begin() + n * nodes.slots, nodes.expert.begin() + (n + 1) * nodes.slots);
    std::sort(groups_of[n].begin(), groups_of[n].end());
  }
}

void pack(const std::vector<double>& load, const std::vector<int32_t>& count, double target, bool connected,
          Bins& bins, int ranks, int slots) {
  bins.reset(ranks, slots);
  const int experts = static_cast<int>(load.size());
  (connected ? pack_connected : pack_largest_first)(load.data(), count.data(), experts, bins);
  swap_down(bins, target, connected ? count.data() : nullptr);
}

// If the heaviest rank is still too heavy after swaps, other counts may be better: an expert of that rank
// gets one replica more, the expert that suffers least gets one less, and all replicas are packed again.
void move_replicas(const std::vector<double>& load, double target, bool connected,
                   std::vector<int32_t>& count, Bins& bins) {
  const int experts = static_cast<int>(load.size());
  Bins trial;
  for (int tries = 0; tries < kTries && bins.max_load() > target;) {
    const int h = bins.heaviest();
    // Sorted by the load of a replica (largest first), and by its load with one replica less.
    std::vector<std::pair<double, int32_t>> takers, givers;
    for (int i = 0; i < bins.slots; ++i) {
      const int32_t e = bins.expert[h * bins.slots + i];
      if (count[e] < bins.ranks) takers.push_back({-bins.size[h * bins.slots + i], e});
    }
    for (int e = 0; e < experts; ++e)
      if (count[e] > 1 && load[e] / (count[e] - 1) < target) givers.push_back({load[e] / (count[e] - 1), e});
    std::sort(takers.begin(), takers.end());
    std::sort(givers.begin(), givers.end());
    bool better = false;
    for (size_t sum = 0; sum < takers.size() + givers.size() && !better && tries < kTries; ++sum)
      for (size_t i = 0; i <= sum && !better && tries < kTries; ++i) {
        const size_t j = sum - i;
        if (i >= takers.size() || j >= givers.size() || takers[i].second == givers[j].second) continue;
        const int32_t to = takers[i].second, from = givers[j].second;
        ++count[to];
        --count[from];
        pack(load, count, target, connected, trial, bins.ranks, bins.slots);
        ++tries;
        better = trial.max_load() < bins.max_load();
        if (better) {
          std::swap(bins, trial);
        } else {
          --count[to];
          ++count[from];
        }
      }
    if (!better) return;
  }
}

void groups_where_they_are(const Grid& g, const int32_t* previous,
                           std::vector<std::vector<int32_t>>& groups_of) {
  const int per_node = g.slots / g.nodes, per_group = g.experts / g.groups;
  for (int n = 0; n < g.nodes; ++n) {
    std::vector<char> here(g.groups, 0);
    for (int i = n * per_node; i < (n + 1) * per_node; ++i) here[previous[i] / per_group] = 1;
    for (int i = 0; i < g.groups; ++i)
      if (here[i]) groups_of[n].push_back(i);
  }
}

// Nodes are interchangeable, so each set of groups is assigned to the node that has most of it already.
void relabel_nodes(const Grid& g, const int32_t* previous, std::vector<std::vector<int32_t>>& groups_of) {
  std::vector<std::vector<int32_t>> before(g.nodes);
  groups_where_they_are(g, previous, before);
  std::vector<int32_t> kept(static_cast<size_t>(g.nodes) * g.nodes);
  for (int i = 0; i < g.nodes; ++i)
    for (int j = 0; j < g.nodes; ++j)
      for (const int32_t group : groups_of[i])
        kept[i * g.nodes + j] += std::binary_search(before[j].begin(), before[j].end(), group);
  const std::vector<int> place_of = match_places(kept, g.nodes);
  std::vector<std::vector<int32_t>> moved(g.nodes);
  for (int i = 0; i < g.nodes; ++i) moved[place_of[i]] = std::move(groups_of[i]);
  groups_of = std::move(moved);
}

// Places the experts of one node (or of all nodes) on its ranks. enough: a load of the heaviest rank that
// needs no improvement.
void place_flat(const std::vector<double>& load, int ranks, int slots, double enough, bool connected,
                Bins& bins) {
  const int experts = static_cast<int>(load.size());
  const double mean = std::accumulate(load.begin(), load.end(), 0.0) / ranks;
  std::vector<int32_t> count(experts);
  bins.reset(ranks, slots);
  if (slots == 2) {
    place_pairs(load.data(), experts, std::max(enough, mean), bins);
    return;
  }
  const double target = std::max(enough, mean * (1 + kClose));
  split_hottest(load.data(), experts, ranks * slots, ranks, count.data());
  pack(load, count, target, connected, bins, ranks, slots);
  if (slots > 1 && bins.max_load() > target * (1 + kFar)) move_replicas(load, target, connected, count, bins);
}

}  // namespace

void rebalance_layer(const Grid& g, const double* given, const Options& options, int32_t* placement) {
  const std::vector<double> scaled = scaled_loads(given, g.experts);
  const double* load = scaled.data();
  const int parts = g.groups > 1 ? g.nodes : 1, per_group = g.experts / g.groups;
  const int ranks = g.ranks / parts, slots = g.slots / g.ranks, per_part = ranks * slots;
  const bool bounded = options.previous && options.max_moves >= 0 && options.max_moves < slots;
  std::vector<std::vector<int32_t>> groups_of(parts);
  if (parts == 1) {
    groups_of[0].resize(g.groups);
    std::iota(groups_of[0].begin(), groups_of[0].end(), 0);
  } else if (bounded) {
    groups_where_they_are(g, options.previous, groups_of);
  } else {
    groups_to_nodes(g, load, groups_of);
    if (options.previous) relabel_nodes(g, options.previous, groups_of);
  }
  // Heaviest node first: the ranks of the other nodes need not be lighter than its heaviest rank.
  std::vector<std::vector<double>> part_load(parts);
  std::vector<std::pair<double, int>> order(parts);
  for (int n = 0; n < parts; ++n) {
    for (const int i : groups_of[n])
      part_load[n].insert(part_load[n].end(), load + i * per_group, load + (i + 1) * per_group);
    order[n] = {-std::accumulate(part_load[n].begin(), part_load[n].end(), 0.0), n};
  }
  std::sort(order.begin(), order.end());
  double enough = 0.0;
  Bins bins;
  std::vector<int32_t> local(g.experts), before(per_part);
  for (const auto& [weight, n] : order) {
    int32_t* out = placement + static_cast<int64_t>(n) * per_part;
    const auto global = [&](int e) { return groups_of[n][e / per_group] * per_group + e % per_group; };
    const int experts = static_cast<int>(part_load[n].size());
    if (options.previous) {
      std::fill(local.begin(), local.end(), -1);
      for (int e = 0; e < experts; ++e) local[global(e)] = e;
      for (int i = 0; i < per_part; ++i)
        before[i] = local[options.previous[static_cast<int64_t>(n) * per_part + i]];
    }
    if (bounded) {
      bins.reset(ranks, slots);
      bins.expert = before;
      improve_by_moves(part_load[n].data(), experts, options.max_moves,
                       std::max(enough, -weight / ranks * (1 + kClose)), bins);
    } else {
      place_flat(part_load[n], ranks, slots, enough, options.connected, bins);
      if (options.previous) relabel_ranks(ranks, slots, experts, before.data(), bins.expert.data());
    }
    enough = std::max(enough, bins.max_load());
    for (int i = 0; i < per_part; ++i) out[i] = global(bins.expert[i]);
  }
}

}  // namespace moecomm::balance
