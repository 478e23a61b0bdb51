// Forest: few replicas that balance the ranks as well as all replicas. Tests what it may change and must
// preserve, and what activation does with it.
#include <cmath>
#include <functional>
#include <numeric>
#include <random>

#include "balance/activate.hpp"
#include "balance/forest.hpp"
#include "balance/rebalance.hpp"
#include "balance/split.hpp"
#include "check.hpp"

using namespace moecomm::balance;

namespace {

struct World {
  Replicas replicas;
  std::vector<double> load, share;
};

// Shares that balance the ranks: a placement for one load, with a split for another load.
World balanced(int ranks, int per_rank, int experts, uint32_t seed, bool connected) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<double> load(experts), later(experts);
  for (int e = 0; e < experts; ++e) {
    load[e] = std::exp(normal(engine));
    later[e] = load[e] * std::exp(0.3 * normal(engine));
  }
  std::vector<int32_t> table(ranks * per_rank);
  rebalance_layer({experts, ranks * per_rank, 1, 1, ranks}, load.data(), {nullptr, -1, connected},
                  table.data());
  World w{Replicas(table.data(), ranks * per_rank, experts, ranks, 1), later, {}};
  w.share.resize(w.replicas.slots);
  split(w.replicas, later.data(), nullptr, 60, w.share.data());
  return w;
}

std::vector<World> worlds() {
  std::vector<World> all;
  for (const auto& [ranks, per_rank, experts] :
       {std::array{8, 6, 20}, std::array{12, 8, 50}, std::array{32, 16, 256}, std::array{4, 4, 5},
        std::array{1, 3, 3}})
    for (uint32_t seed = 0; seed < 6; ++seed)
      all.push_back(balanced(ranks, per_rank, experts, seed, seed % 2));
  return all;
}

std::vector<double> sums(const std::vector<int32_t>& of, int n, const std::vector<double>& share) {
  std::vector<double> sum(n, 0.0);
  for (size_t i = 0; i < share.size(); ++i) sum[of[i]] += share[i];
  return sum;
}

bool near(const std::vector<double>& a, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (std::abs(a[i] - b[i]) > 1e-9 * (1 + std::abs(b[i]))) return false;
  return true;
}

std::vector<uint8_t> running(const Forest& f, const Replicas& r) {
  std::vector<uint8_t> runs;
  for (int i = 0; i < r.slots; ++i) runs.push_back(f.runs(i));
  return runs;
}

std::vector<int> per_rank(const Replicas& r, const std::vector<uint8_t>& runs) {
  std::vector<int> used(r.ranks, 0);
  for (int i = 0; i < r.slots; ++i) used[r.rank[i]] += runs[i];
  return used;
}

int above(const std::vector<int>& used, int limit) {
  int sum = 0;
  for (const int n : used) sum += std::max(0, n - limit);
  return sum;
}

// Changes preserve the load of experts and ranks; replicas that do not run have no share; and no cycle
// remains.
void check_forest(const World& w, const Forest& f, const std::vector<double>& share) {
  const Replicas& r = w.replicas;
  CHECK(near(sums(r.expert, r.experts, share), w.load));
  CHECK(near(sums(r.rank, r.ranks, share), sums(r.rank, r.ranks, w.share)));
  std::vector<int> tree(r.experts + r.ranks);
  std::iota(tree.begin(), tree.end(), 0);
  const std::function<int(int)> root = [&](int n) { return tree[n] == n ? n : tree[n] = root(tree[n]); };
  for (int i = 0; i < r.slots; ++i) {
    CHECK(share[i] >= -1e-12 * w.load[r.expert[i]]);
    if (!f.runs(i)) {
      CHECK_EQ(share[i], 0.0);
      continue;
    }
    const int a = root(r.expert[i]), b = root(r.experts + r.rank[i]);
    CHECK(a != b);
    tree[a] = b;
  }
}

// Experts 0 and 1 on ranks 0 and 1 form a cycle of four replicas, and each rank also has other experts.
// spare: the number of other experts of rank 0; rank 1 has three.
World cycle(int spare, std::array<double, 4> shares) {
  std::vector<int32_t> table{0, 1, 2, 3, 4, 0, 1, 5, 6, 7};
  World w{Replicas(table.data(), 10, 8, 2, 1), std::vector<double>(8, 0.0), std::vector<double>(10, 0.0)};
  const auto give = [&](int slot, double amount) {
    const int i = w.replicas.at_slot[slot];
    w.share[i] = amount;
    w.load[w.replicas.expert[i]] += amount;
  };
  give(0, shares[0]), give(5, shares[1]);  // expert 0
  give(1, shares[2]), give(6, shares[3]);  // expert 1
  for (int k = 0; k < 3; ++k) {
    if (k < spare) give(2 + k, 10);
    if (k < 3 - spare) give(7 + k, 10);
  }
  return w;
}

}  // namespace

TEST(prune_keeps_every_sum_and_leaves_no_cycle) {
  int stopped = 0;
  for (const World& w : worlds()) {
    std::vector<double> share = w.share;
    Forest f(w.replicas, share.data());
    const std::vector<uint8_t> before = running(f, w.replicas);
    f.prune();
    check_forest(w, f, share);
    const std::vector<uint8_t> after = running(f, w.replicas);
    for (size_t i = 0; i < after.size(); ++i) {
      CHECK(before[i] || !after[i]);  // no replica starts
      stopped += before[i] - after[i];
    }
    std::vector<double> again = share;
    Forest g(w.replicas, again.data());
    g.prune();
    CHECK(again == share);  // a forest is not changed
  }
  CHECK(stopped > 500);
}

TEST(prune_relieves_the_fuller_rank) {
  // In one direction replica 0 of expert 0 and replica 1 of expert 1 lose load, in the other direction the
  // other two. The smallest of those that lose load stops.
  for (const bool first_is_fuller : {true, false}) {
    World w = cycle(first_is_fuller ? 3 : 0, {3, 4, 2, 1});  // rank 0 has 3 and 2, rank 1 has 4 and 1
    Forest f(w.replicas, w.share.data());
    const std::vector<double> ranks = sums(w.replicas.rank, 2, w.share);
    f.prune();
    const auto at = [&](int slot) { return w.share[w.replicas.at_slot[slot]]; };
    const std::array<double, 4> want =
        first_is_fuller ? std::array<double, 4>{5, 2, 0, 3} : std::array<double, 4>{2, 5, 3, 0};
    CHECK_EQ(at(0), want[0]);
    CHECK_EQ(at(5), want[1]);
    CHECK_EQ(at(1), want[2]);
    CHECK_EQ(at(6), want[3]);
    CHECK(sums(w.replicas.rank, 2, w.share) == ranks);
    CHECK_EQ(f.runs(w.replicas.at_slot[first_is_fuller ? 1 : 6]), false);
  }
}

TEST(fit_keeps_every_sum_and_makes_one_exchange_at_a_time) {
  for (const World& w : worlds()) {
    std::vector<double> share = w.share;
    Forest f(w.replicas, share.data());
    f.prune();
    std::vector<uint8_t> runs = running(f, w.replicas);
    const std::vector<int> used = per_rank(w.replicas, runs);
    const int limit =
        (std::accumulate(used.begin(), used.end(), 0) + w.replicas.ranks - 1) / w.replicas.ranks;
    f.fit(limit, 0);
    CHECK(running(f, w.replicas) == runs);
    for (int k = 0; k < 6; ++k) {
      const int before = above(per_rank(w.replicas, runs), limit);
      f.fit(limit, 1);
      check_forest(w, f, share);
      const std::vector<uint8_t> now = running(f, w.replicas);
      int started = 0, ended = 0;
      for (size_t i = 0; i < now.size(); ++i) started += now[i] > runs[i], ended += now[i] < runs[i];
      CHECK_EQ(started, ended);
      CHECK(started <= 1);
      const std::vector<int> full = per_rank(w.replicas, now);
      CHECK(above(full, limit) <= before);  // replicas start only on ranks with room
      runs = now;
    }
  }
}

// Without spare room most replicas above the limit still find a place; with one more slot per rank all of
// them do.
TEST(fit_brings_ranks_down_to_the_limit) {
  for (const int spare : {0, 1}) {
    int before = 0, after = 0;
    for (const World& w : worlds()) {
      std::vector<double> share = w.share;
      Forest f(w.replicas, share.data());
      f.prune();
      const std::vector<int> used = per_rank(w.replicas, running(f, w.replicas));
      const int limit =
          (std::accumulate(used.begin(), used.end(), 0) + w.replicas.ranks - 1) / w.replicas.ranks + spare;
      f.fit(limit, 200);
      check_forest(w, f, share);
      before += above(used, limit);
      after += above(per_rank(w.replicas, running(f, w.replicas)), limit);
    }
    CHECK(before > (spare ? 5 : 40));
    CHECK(spare ? after <= 1 : 2 * after < before);
  }
}

TEST(fit_changes_nothing_where_all_fits) {
  for (const World& w : worlds()) {
    std::vector<double> share = w.share;
    Forest f(w.replicas, share.data());
    f.prune();
    const std::vector<double> kept = share;
    const std::vector<int> used = per_rank(w.replicas, running(f, w.replicas));
    for (const int limit : {*std::max_element(used.begin(), used.end()), w.replicas.slots_per_rank()})
      f.fit(limit, 20);
    CHECK(share == kept);
  }
}

// The active replicas: within the limit, every expert runs somewhere, and the ranks are nearly as balanced as
// with all replicas: exactly if a forest fits, else as well as the limit allows.
TEST(activation_balances_within_the_limit) {
  struct Shape {
    int ranks, hosted, experts, limit;
    double mean, worst;
  };
  for (const Shape& c : {Shape{8, 6, 20, 4, 1.0005, 1.001},
                         {12, 8, 50, 6, 1.0005, 1.001},
                         {32, 16, 256, 9, 1.0115, 1.0175},
                         {16, 12, 100, 8, 1.0005, 1.001},
                         {16, 12, 100, 7, 1.027, 1.065},
                         {12, 8, 50, 5, 1.014, 1.05}}) {
    double worst = 0, sum = 0;
    const int seeds = 12;
    for (uint32_t seed = 0; seed < seeds; ++seed) {
      const World w = balanced(c.ranks, c.hosted, c.experts, seed, true);
      const Replicas& r = w.replicas;
      std::vector<uint8_t> active(r.slots);
      CHECK_EQ(activate(r, w.load.data(), c.limit, active.data()), -1);
      for (const int used : per_rank(r, active)) CHECK(used <= c.limit);
      std::vector<int> runs(r.experts, 0);
      for (int i = 0; i < r.slots; ++i) runs[r.expert[i]] += active[i];
      for (const int n : runs) CHECK(n >= 1);
      std::vector<double> share(r.slots);
      const double all = split(r, w.load.data(), nullptr, 60, share.data()),
                   few = split(r, w.load.data(), active.data(), 60, share.data());
      worst = std::max(worst, few / all);
      sum += few / all;
    }
    CHECK(worst < c.worst);
    CHECK(sum / seeds < c.mean);
  }
}

TEST(activation_runs_an_expert_whose_load_shows_nowhere) {
  for (uint32_t seed = 0; seed < 12; ++seed) {
    World w = balanced(12, 8, 50, seed, true);
    const Replicas& r = w.replicas;
    const int e = r.shared[seed % r.shared.size()];
    w.load[e] = 1e-30;  // negligible in the load of a rank
    std::vector<uint8_t> active(r.slots);
    CHECK_EQ(activate(r, w.load.data(), 6, active.data()), -1);
    CHECK(std::accumulate(active.begin() + r.first[e], active.begin() + r.first[e + 1], 0) >= 1);
  }
}
