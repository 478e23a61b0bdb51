#include "runtime/sim/explore.hpp"

namespace moecomm {
namespace {

struct Difference {
  bool found = false;
  int call = -1, rank = -1;
  std::string what;
};

Difference compare(SimCluster& cluster, const std::vector<SimResult>& got,
                   const std::vector<SimResult>& want) {
  const int size = cluster.config().size;
  const auto at = [&](size_t i, std::string what) {
    return Difference{true, static_cast<int>(i) / size, static_cast<int>(i) % size, std::move(what)};
  };
  if (cluster.net().stuck()) {
    for (size_t i = 0; i < got.size(); ++i)
      if (got[i].status.code == Code::timeout) return at(i, "deadlock");
    return at(0, "deadlock");
  }
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i].status.code != want[i].status.code || got[i].ran != want[i].ran)
      return at(i, "another status than without chaos");
    if (got[i].digest != want[i].digest) return at(i, "delivered something else than without chaos");
  }
  return {};
}

}  // namespace

Finding explore(SimCluster& cluster, const std::vector<SimCall>& program, const Mutation& mutation,
                uint64_t first_seed, uint64_t count) {
  constexpr uint64_t kNoLimit = ~uint64_t{0};
  cluster.reset({});
  const std::vector<SimResult> want = cluster.run(program);
  // With poison, a mutant that uses it as an index would crash instead of being found.
  const auto attempt = [&](uint64_t seed, uint64_t budget) {
    cluster.reset(Chaos(seed, budget), 0, mutation.mutant == Mutant::none && seed % 2 ? SimNet::kPoison : 0);
    return compare(cluster, cluster.run(program, mutation), want);
  };
  Finding f;
  for (uint64_t seed = first_seed; seed < first_seed + count; ++seed) {
    ++f.schedules;
    if (!attempt(seed, kNoLimit).found) continue;
    // Finds a small number of perturbations with which it still fails, in steps that are halved.
    uint64_t budget = cluster.net().chaos().drawn();
    for (uint64_t step = budget / 2; step > 0;) {
      if (budget >= step && attempt(seed, budget - step).found)
        budget -= step;
      else
        step /= 2;
    }
    cluster.net().set_log(true);
    const Difference d = attempt(seed, budget);
    f.found = true;
    f.seed = seed;
    f.perturbations = budget;
    f.call = d.call;
    f.rank = d.rank;
    f.what = d.what;
    f.log = cluster.net().log_lines();
    f.stuck = cluster.net().stuck_roles();
    cluster.net().set_log(false);
    return f;
  }
  return f;
}

}  // namespace moecomm
