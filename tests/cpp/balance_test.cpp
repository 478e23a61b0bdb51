// The balance core: every placement is complete and free of duplicates, and good where the optimum is known.
#include <cmath>
#include <numeric>
#include <random>
#include <set>

#include "balance/counts.hpp"
#include "balance/rebalance.hpp"
#include "balance/relabel.hpp"
#include "check.hpp"

using namespace moecomm::balance;

namespace {

std::vector<double> lognormal(int n, double sigma, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<double> load(n);
  for (double& l : load) l = std::exp(sigma * normal(engine));
  return load;
}

// The heaviest rank's load over the mean; checks what every placement must satisfy.
double heaviest(const Grid& g, const std::vector<double>& load, const std::vector<int32_t>& placement) {
  std::vector<int> count(g.experts, 0);
  for (const int32_t e : placement) {
    REQUIRE(e >= 0 && e < g.experts);
    ++count[e];
  }
  for (const int n : count) CHECK(n >= 1);
  const int slots = g.slots / g.ranks;
  double most = 0;
  for (int r = 0; r < g.ranks; ++r) {
    const std::set<int32_t> held(placement.begin() + r * slots, placement.begin() + (r + 1) * slots);
    CHECK_EQ(held.size(), static_cast<size_t>(slots));
    double sum = 0;
    for (const int32_t e : held) sum += load[e] / count[e];
    most = std::max(most, sum);
  }
  const double total = std::accumulate(load.begin(), load.end(), 0.0);
  return total > 0 ? most * g.ranks / total : 1.0;
}

int most_moves(const Grid& g, const std::vector<int32_t>& before, const std::vector<int32_t>& after) {
  const int slots = g.slots / g.ranks;
  int most = 0;
  for (int r = 0; r < g.ranks; ++r) {
    int n = 0;
    for (int i = r * slots; i < (r + 1) * slots; ++i) n += before[i] != after[i];
    most = std::max(most, n);
  }
  return most;
}

const std::vector<Grid> kGrids = {
    {8, 12, 1, 1, 4}, {8, 16, 1, 1, 8}, {8, 8, 1, 1, 8}, {16, 24, 4, 2, 4}, {16, 32, 4, 2, 16}, {3, 6, 1, 1, 3}, {5, 30, 1, 2, 6}, {2, 4, 1, 1, 2},
    {64, 72, 8, 4, 8}, {256, 288, 8, 4, 32}, {256, 288, 1, 1, 144}, {257, 320, 1, 1, 320}, {1, 4, 1, 1, 4},
};

}  // namespace

TEST_CASES(placements_are_complete, kGrids) {
  const Grid& g = value;
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::vector<double> load = lognormal(g.experts, 0.25 * (seed % 8), seed);
    if (seed % 5 == 1) std::fill(load.begin(), load.end(), 0.0);
    if (seed % 5 == 2) std::fill(load.begin() + g.experts / 4 + 1, load.end(), 0.0);
    std::vector<int32_t> placement(g.slots), again(g.slots), next(g.slots);
    rebalance_layer(g, load.data(), {}, placement.data());
    rebalance_layer(g, load.data(), {}, again.data());
    CHECK(placement == again);
    heaviest(g, load, placement);
    const std::vector<double> drifted = lognormal(g.experts, 1.0, seed + 100);
    for (int moves = -1; moves <= 2; ++moves) {
      rebalance_layer(g, drifted.data(), {placement.data(), moves}, next.data());
      const double now = heaviest(g, drifted, next), stale = heaviest(g, drifted, placement);
      if (moves >= 0) CHECK(most_moves(g, placement, next) <= moves);
      if (moves >= 0 && moves < g.slots / g.ranks) CHECK(now <= stale * (1 + 1e-9));
    }
    rebalance_layer(g, load.data(), {placement.data(), 0}, next.data());
    CHECK(placement == next);
  }
}

TEST(groups_stay_in_a_node) {
  const Grid g{64, 96, 8, 4, 16};
  const std::vector<double> load = lognormal(64, 1.0, 3);
  std::vector<int32_t> placement(g.slots), next(g.slots);
  rebalance_layer(g, load.data(), {}, placement.data());
  for (int moves : {-1, 1}) {
    rebalance_layer(g, lognormal(64, 1.0, 4).data(), {placement.data(), moves}, next.data());
    std::vector<std::set<int>> nodes(g.groups);
    for (int i = 0; i < g.slots; ++i) nodes[next[i] / 8].insert(i / 24);
    for (const auto& n : nodes) CHECK_EQ(n.size(), 1u);
  }
}

TEST(one_slot_per_rank_is_optimal_and_near_the_previous) {
  for (uint32_t seed = 0; seed < 50; ++seed) {
    const int experts = 20, slots = 32;
    const std::vector<double> load = lognormal(experts, 1.0, seed), later = lognormal(experts, 1.0, seed + 1000);
    std::vector<int32_t> count(experts), best(experts), near(experts);
    split_hottest(load.data(), experts, slots, slots, count.data());
    split_hottest(later.data(), experts, slots, slots, best.data());
    split_hottest_near(later.data(), experts, slots, slots, count.data(), near.data());
    double largest = 0, kept = 0;
    int needed = 0, changed = 0;
    for (int e = 0; e < experts; ++e) largest = std::max(largest, later[e] / best[e]);
    for (int e = 0; e < experts; ++e) {
      kept = std::max(kept, later[e] / near[e]);
      int n = 1;
      while (later[e] / n > largest) ++n;
      needed += std::max(0, n - count[e]);
      changed += std::max(0, near[e] - count[e]);
    }
    CHECK_EQ(kept, largest);
    CHECK_EQ(changed, needed);   // no replica moves that the optimum does not ask for
    CHECK_EQ(std::accumulate(near.begin(), near.end(), 0), slots);
  }
}

// Two slots per rank, all counts tried: a tiny world is the hardest for the search, one replica is a lot there.
TEST(pairs_against_all_counts) {
  double excess = 0;
  const int experts = 6, ranks = 5;
  for (uint32_t seed = 0; seed < 40; ++seed) {
    const std::vector<double> load = lognormal(experts, 0.2 + 0.05 * seed, seed);
    const Grid g{experts, 2 * ranks, 1, 1, ranks};
    std::vector<int32_t> placement(g.slots);
    rebalance_layer(g, load.data(), {}, placement.data());
    double best = 1e9;
    std::vector<int> count(experts, 1);
    const std::function<void(int, int)> all = [&](int e, int left) {
      if (e == experts - 1) {
        count[e] = 1 + left;
        if (count[e] > ranks) return;
        std::vector<std::pair<double, int>> pieces;
        for (int i = 0; i < experts; ++i) pieces.insert(pieces.end(), count[i], {load[i] / count[i], i});
        std::sort(pieces.begin(), pieces.end());
        double most = 0;
        for (int r = 0; r < ranks; ++r) {
          const auto &low = pieces[r], &high = pieces[2 * ranks - 1 - r];
          if (low.second == high.second) return;   // would need a trade that costs something
          most = std::max(most, low.first + high.first);
        }
        best = std::min(best, most);
        return;
      }
      for (int n = 0; n <= left && n < ranks; ++n) {
        count[e] = 1 + n;
        all(e + 1, left - n);
      }
    };
    all(0, g.slots - experts);
    const double mean = std::accumulate(load.begin(), load.end(), 0.0) / ranks;
    const double got = heaviest(g, load, placement) * mean;
    CHECK(got <= best * 1.12);
    excess += std::max(0.0, got / best - 1);
  }
  CHECK(excess / 40 <= 0.02);
}

TEST(relabelling_a_permutation_keeps_everything) {
  std::mt19937 engine(1);
  const int ranks = 24, slots = 3, experts = 72;
  std::vector<int32_t> before(ranks * slots), shuffled;
  std::iota(before.begin(), before.end(), 0);
  std::vector<int> order(ranks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), engine);
  for (const int r : order)
    for (int i : {2, 0, 1}) shuffled.push_back(before[r * slots + i]);
  relabel_ranks(ranks, slots, experts, before.data(), shuffled.data());
  CHECK(shuffled == before);
}
