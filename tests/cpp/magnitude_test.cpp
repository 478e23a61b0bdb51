// csrc/balance with loads of any magnitude: byte counts that were never reset, averages that decayed to
// almost zero.
#include <cfloat>
#include <cmath>

#include "balance/activate.hpp"
#include "balance/rebalance.hpp"
#include "balance/split.hpp"
#include "check.hpp"
#include "loads.hpp"

using namespace moecomm::balance;

namespace {

std::vector<std::vector<double>> extreme_loads(int experts, uint32_t seed) {
  std::vector<std::vector<double>> found;
  for (const double unit :
       {DBL_TRUE_MIN, 1e-320, DBL_MIN, 1e-300, 1e-200, 1e-155, 1e155, 1e200, 1e300, DBL_MAX / 1e4}) {
    found.push_back(lognormal(experts, 1.0, seed));
    for (double& l : found.back()) l = std::min(l, 1e4) * unit;
  }
  const auto one_and_others = [&](double one, double others) {
    found.push_back(std::vector<double>(experts, others));
    found.back()[seed % experts] = one;
  };
  one_and_others(DBL_MAX, DBL_MAX);
  one_and_others(DBL_MAX, DBL_TRUE_MIN);
  one_and_others(DBL_MAX, 0.0);
  one_and_others(1.0, 1e-320);
  one_and_others(0.0, 1e300);
  one_and_others(DBL_TRUE_MIN, 0.0);
  return found;
}

}  // namespace

TEST_CASES(loads_of_any_magnitude_are_placed, kGrids) {
  const Grid& g = value;
  for (uint32_t seed = 0; seed < 3; ++seed)
    for (const std::vector<double>& load : extreme_loads(g.experts, seed)) {
      std::vector<int32_t> placement(g.slots), next(g.slots);
      for (const bool connected : {false, true}) {
        rebalance_layer(g, load.data(), {nullptr, -1, connected}, placement.data());
        heaviest(g, std::vector<double>(g.experts, 0.0), placement);
      }
      for (const int moves : {-1, 1})
        for (const std::vector<double>& later :
             {lognormal(g.experts, 1.0, seed), std::vector<double>(g.experts, DBL_MAX)}) {
          rebalance_layer(g, later.data(), {placement.data(), moves}, next.data());
          heaviest(g, std::vector<double>(g.experts, 0.0), next);
        }
    }
}

TEST_CASES(a_placement_does_not_depend_on_the_unit_of_loads, kGrids) {
  const Grid& g = value;
  for (uint32_t seed = 0; seed < 5; ++seed) {
    const std::vector<double> load = lognormal(g.experts, 1.0, seed);
    std::vector<int32_t> placement(g.slots), scaled(g.slots);
    rebalance_layer(g, load.data(), {}, placement.data());
    for (const int exponent : {-900, -600, 3, 600, 900}) {
      std::vector<double> other(load);
      for (double& l : other) l = std::ldexp(l, exponent);
      rebalance_layer(g, other.data(), {}, scaled.data());
      CHECK(placement == scaled);
    }
  }
}

TEST_CASES(loads_of_any_magnitude_are_activated_and_split, kGrids) {
  const Grid& g = value;
  const int per_rank = g.slots / g.ranks;
  for (uint32_t seed = 0; seed < 3; ++seed) {
    std::vector<int32_t> placement(g.slots);
    rebalance_layer(g, lognormal(g.experts, 1.0, seed + 50).data(), {}, placement.data());
    const Replicas r(placement.data(), g.slots, g.experts, g.ranks, g.nodes);
    for (const std::vector<double>& load : extreme_loads(g.experts, seed))
      for (int limit = std::max(1, per_rank - 1); limit <= per_rank; ++limit) {
        std::vector<uint8_t> active(r.slot.size());
        const int stuck = activate(r, load.data(), limit, active.data());
        CHECK(limit < per_rank || stuck < 0);
        if (stuck >= 0) continue;
        std::vector<int> runs(g.experts, 0), used(g.ranks, 0);
        for (size_t i = 0; i < active.size(); ++i)
          if (active[i]) ++runs[r.expert[i]], ++used[r.rank[i]];
        for (int e = 0; e < g.experts; ++e) CHECK(load[e] == 0.0 || runs[e] > 0);
        for (const int n : used) CHECK(n <= limit);
        std::vector<double> share(r.slot.size());
        split(r, load.data(), active.data(), 24, share.data());
      }
  }
}
