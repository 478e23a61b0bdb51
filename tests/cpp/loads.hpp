// Loads and grids for the tests of csrc/balance, and the conditions that every placement must satisfy.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "balance/rebalance.hpp"
#include "check.hpp"

namespace moecomm::balance {

inline std::vector<double> lognormal(int n, double sigma, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<double> load(n);
  for (double& l : load) l = std::exp(sigma * normal(engine));
  return load;
}

// The heaviest rank's load over the mean. Checks the conditions that every placement must satisfy.
inline double heaviest(const Grid& g, const std::vector<double>& load,
                       const std::vector<int32_t>& placement) {
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

inline const std::vector<Grid> kGrids = {
    {8, 12, 1, 1, 4},      {8, 16, 1, 1, 8},      {8, 8, 1, 1, 8}, {16, 24, 4, 2, 4}, {16, 32, 4, 2, 16},
    {3, 6, 1, 1, 3},       {5, 30, 1, 2, 6},      {2, 4, 1, 1, 2}, {64, 72, 8, 4, 8}, {256, 288, 8, 4, 32},
    {256, 288, 1, 1, 144}, {257, 320, 1, 1, 320}, {1, 4, 1, 1, 4},
};

}  // namespace moecomm::balance
