// csrc/balance: every placement is complete and has no duplicates, and is near the optimum where that is
// known.
#include <cmath>
#include <numeric>
#include <random>
#include <set>

#include "balance/activate.hpp"
#include "balance/counts.hpp"
#include "balance/rebalance.hpp"
#include "balance/relabel.hpp"
#include "balance/replica_policy.hpp"
#include "balance/route.hpp"
#include "balance/split.hpp"
#include "check.hpp"
#include "loads.hpp"

using namespace moecomm::balance;
using moecomm::BadInput;

namespace {

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
    const std::vector<double> load = lognormal(experts, 1.0, seed),
                              later = lognormal(experts, 1.0, seed + 1000);
    std::vector<int32_t> count(experts), best(experts);
    split_hottest(load.data(), experts, slots, slots, count.data());
    split_hottest(later.data(), experts, slots, slots, best.data());
    double largest = 0;
    int needed = 0, changed = 0;
    for (int e = 0; e < experts; ++e) largest = std::max(largest, later[e] / best[e]);
    for (int e = 0; e < experts; ++e) {
      int n = 1;
      while (later[e] / n > largest) ++n;
      needed += std::max(0, n - count[e]);
      changed += std::max(0, best[e] - count[e]);
    }
    CHECK_EQ(changed, needed);  // no unnecessary moves
    CHECK_EQ(std::accumulate(best.begin(), best.end(), 0), slots);
  }
}

// Two slots per rank, compared with all possible counts. Few ranks are the hardest case for the search,
// because one replica matters much.
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
          if (low.second == high.second) return;  // would need a trade that increases the load
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

TEST(relabeling_a_permutation_keeps_everything) {
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

namespace {

// A placement for a random load, and another load at a later time.
struct Layer {
  Replicas replicas;
  std::vector<double> load;
};

Layer layer(const Grid& g, uint32_t seed, bool connected) {
  std::vector<int32_t> placement(g.slots);
  rebalance_layer(g, lognormal(g.experts, 1.0, seed).data(), {nullptr, -1, connected}, placement.data());
  std::vector<double> load = lognormal(g.experts, 1.0, seed);
  const std::vector<double> change = lognormal(g.experts, 0.2, seed + 1);
  for (int e = 0; e < g.experts; ++e) load[e] = std::floor(100 * load[e] * change[e]);
  load[seed % g.experts] = 0;
  return {Replicas(placement.data(), g.slots, g.experts, g.ranks, g.nodes), load};
}

std::vector<double> rank_loads(const Replicas& r, const std::vector<double>& share) {
  std::vector<double> level(r.ranks, 0.0);
  for (size_t i = 0; i < share.size(); ++i) level[r.rank[i]] += share[i];
  return level;
}

const Grid kWorld{64, 80, 1, 2, 8};

}  // namespace

TEST(split_shares_are_whole_and_at_their_minimum) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    const auto [r, load] = layer(kWorld, seed, seed % 2);
    std::vector<double> share(r.slot.size()), again(r.slot.size());
    const double most = split(r, load.data(), nullptr, 200, share.data());
    split(r, load.data(), nullptr, 200, again.data());
    CHECK(share == again);
    const std::vector<double> level = rank_loads(r, share);
    CHECK(std::abs(most - *std::max_element(level.begin(), level.end())) < 1e-6 * most);
    for (int e = 0; e < r.experts; ++e) {
      double sum = 0, lowest = 1e300;
      for (int i = r.first[e]; i < r.first[e + 1]; ++i) {
        CHECK(share[i] >= 0);
        sum += share[i];
        lowest = std::min(lowest, level[r.rank[i]]);
      }
      CHECK(std::abs(sum - load[e]) < 1e-6 * (1 + load[e]));
      // At the minimum of the squares no expert has load on a rank while another of its ranks is lower.
      for (int i = r.first[e]; i < r.first[e + 1]; ++i)
        if (share[i] > 0.02 * most) CHECK(level[r.rank[i]] <= lowest + 0.02 * most);
    }
  }
}

// The rows of every source and slot, [sources, slots].
std::vector<int32_t> rows_of_all(const ReplicaPolicy& choice, const ReplicaPolicy::Solved& solved,
                                 const std::vector<int32_t>& counts, int sources) {
  const int experts = choice.replicas().experts, slots = choice.replicas().slots;
  std::vector<int32_t> rows, before(experts, 0);
  for (int s = 0; s < sources; ++s) {
    for (int p = 0; p < slots; ++p)
      rows.push_back(choice.rows(solved, s, before.data(), counts.data() + s * experts, p));
    for (int e = 0; e < experts; ++e) before[e] += counts[s * experts + e];
  }
  return rows;
}

TEST(rows_of_all_sources_make_the_split) {
  const int sources = 5;
  for (uint32_t seed = 0; seed < 10; ++seed)
    for (Mode mode : {Mode::even, Mode::optimal})
      for (int activate : {0, 3}) {
        const auto [r, load] = layer(kWorld, seed, true);
        std::mt19937 engine(seed);
        std::vector<int32_t> counts(sources * r.experts, 0), total(r.experts), table(r.slots);
        for (int e = 0; e < r.experts; ++e)
          for (int n = 0; n < load[e]; ++n) ++total[e], ++counts[engine() % sources * r.experts + e];
        for (int p = 0; p < r.slots; ++p) table[p] = r.expert[r.at_slot[p]];
        const ReplicaPolicy choice(table.data(), r.slots, r.experts, r.ranks, r.nodes, mode,
                                   activate ? r.slots_per_rank() - 1 : 0);
        const ReplicaPolicy::Solved solved = choice.solve(total.data(), static_cast<int>(seed));
        const std::vector<int32_t> rows = rows_of_all(choice, solved, counts, sources);
        const std::vector<double> floats(total.begin(), total.end());
        std::vector<double> share(r.slots), sum(r.slots, 0.0);
        split(r, floats.data(), solved.active.empty() ? nullptr : solved.active.data(), 24, share.data());
        for (int s = 0; s < sources; ++s)
          for (int e = 0; e < r.experts; ++e) {
            int served = 0, low = 1 << 30, high = 0;
            for (int i = r.first[e]; i < r.first[e + 1]; ++i) {
              const int32_t n = rows[s * r.slots + r.slot[i]];
              served += n;
              sum[i] += n;
              if (!solved.active.empty() && !solved.active[i]) {
                CHECK_EQ(n, 0);
                continue;
              }
              low = std::min(low, n), high = std::max(high, n);
            }
            CHECK_EQ(served, counts[s * r.experts + e]);
            if (mode == Mode::even) CHECK(high - low <= 1);
          }
        for (int i = 0; i < r.slots && mode == Mode::optimal; ++i)
          CHECK(std::abs(sum[i] - share[i]) <= 1.0 + 1e-6);  // only rounding
      }
}

// What every rank computes about every other rank is what that rank does.
TEST(rows_that_follow_are_those_that_are_routed) {
  const int sources = 4, tokens = 40, top_k = 4;
  std::mt19937 engine(3);
  for (int round = 0; round < 12; ++round) {
    const auto [r, load] = layer(kWorld, static_cast<uint32_t>(round), true);
    std::vector<int32_t> table(r.slots);
    for (int p = 0; p < r.slots; ++p) table[p] = r.expert[r.at_slot[p]];
    const ReplicaPolicy choice(table.data(), r.slots, r.experts, r.ranks, r.nodes,
                               round % 2 ? Mode::even : Mode::optimal,
                               round % 3 ? 0 : r.slots_per_rank() - 1);
    std::vector<int32_t> counts(sources * r.experts), total(r.experts, 0), before(r.experts, 0);
    std::vector<std::vector<int64_t>> ids(sources);
    for (int s = 0; s < sources; ++s) {
      for (int i = 0; i < tokens * top_k; ++i)
        ids[s].push_back(engine() % 9 == 0 ? -1 : engine() % (r.experts / top_k) * top_k + i % top_k);
      CHECK(count_picks(ids[s].data(), tokens, top_k, r.experts, counts.data() + s * r.experts).bad ==
            BadInput::none);
      for (int e = 0; e < r.experts; ++e) total[e] += counts[s * r.experts + e];
    }
    const ReplicaPolicy::Solved solved = choice.solve(total.data(), round);
    const std::vector<int32_t> rows = rows_of_all(choice, solved, counts, sources);
    for (int s = 0; s < sources; ++s) {
      std::vector<int64_t> physical(tokens * top_k);
      std::vector<int32_t> routed(r.slots, 0);
      choice.route(solved, {ids[s].data(), tokens, top_k, counts.data() + s * r.experts},
                   s * r.ranks / sources, before.data(), physical.data());
      for (int i = 0; i < tokens * top_k; ++i) {
        CHECK_EQ(physical[i] < 0 ? int64_t{-1} : int64_t{table[physical[i]]}, ids[s][i]);
        if (physical[i] >= 0) ++routed[physical[i]];
      }
      if (s == 0 || round % 2 == 0)  // Mode::even: the rank changes the rotation
        for (int p = 0; p < r.slots; ++p) CHECK_EQ(routed[p], rows[s * r.slots + p]);
      for (int e = 0; e < r.experts; ++e) before[e] += counts[s * r.experts + e];
    }
  }
}

TEST(routes_keep_to_quotas_and_refuse_bad_ids) {
  const auto [r, load] = layer(kWorld, 4, true);
  const int tokens = 50, top_k = 4;
  std::mt19937 engine(9);
  std::vector<int64_t> ids(tokens * top_k), physical(tokens * top_k);
  for (int t = 0; t < tokens; ++t)
    for (int k = 0; k < top_k; ++k) ids[t * top_k + k] = k == 3 && t % 7 == 0 ? -1 : (engine() % 16) * 4 + k;
  std::vector<int32_t> counts(r.experts), quota(r.slot.size());
  CHECK(count_picks(ids.data(), tokens, top_k, r.experts, counts.data()).bad == BadInput::none);
  for (int i = 0; i < r.slots; ++i) quota[i] = even_quota(r, i, counts[r.expert[i]], nullptr, 1);
  for (bool by_quota : {true, false}) {
    if (by_quota)
      route_by_quota(r, ids.data(), tokens, top_k, 0, quota.data(), physical.data());
    else
      route_locally(r, ids.data(), tokens, top_k, 0, nullptr, 0, physical.data());
    for (int i = 0; i < tokens * top_k; ++i)
      CHECK_EQ(physical[i] < 0 ? int64_t{-1} : int64_t{r.expert[r.at_slot[physical[i]]]}, ids[i]);
    if (by_quota) CHECK_EQ(*std::max_element(quota.begin(), quota.end()), 0);
  }
  ids[21] = 64;
  CHECK(count_picks(ids.data(), tokens, top_k, r.experts, counts.data()).bad == BadInput::id_out_of_range);
  ids[21] = ids[22];
  const Refusal twice = count_picks(ids.data(), tokens, top_k, r.experts, counts.data());
  CHECK(twice.bad == BadInput::id_twice);
  CHECK_EQ(twice.token, 5);
}

// Compared with all choices: a layer that can run within the limit is never refused.
TEST(activation_finds_a_choice_where_there_is_one) {
  std::mt19937 engine(3);
  int possible = 0, impossible = 0;
  for (int round = 0; round < 1500; ++round) {
    const int ranks = 4, per_rank = 4, experts = 8, limit = 2;
    std::vector<int32_t> table;
    std::vector<int> held(experts, 0);
    for (int rank = 0; rank < ranks; ++rank) {
      std::vector<int32_t> all(experts);
      std::iota(all.begin(), all.end(), 0);
      std::shuffle(all.begin(), all.end(), engine);
      for (int i = 0; i < per_rank; ++i) table.push_back(all[i]), ++held[all[i]];
    }
    if (*std::min_element(held.begin(), held.end()) == 0) continue;
    const Replicas r(table.data(), ranks * per_rank, experts, ranks, 1);
    const std::vector<double> load = lognormal(experts, 1.0, round);
    std::vector<uint8_t> active(r.slot.size());
    const int stuck = activate(r, load.data(), limit, active.data());
    std::vector<int> used(ranks, 0);
    const std::function<bool(int)> any = [&](int e) {
      if (e == experts) return true;
      for (int i = r.first[e]; i < r.first[e + 1]; ++i) {
        if (used[r.rank[i]] == limit) continue;
        ++used[r.rank[i]];
        const bool rest = any(e + 1);
        --used[r.rank[i]];
        if (rest) return true;
      }
      return false;
    };
    const bool exists = any(0);
    CHECK_EQ(stuck < 0, exists);
    (exists ? possible : impossible) += 1;
    if (stuck >= 0) continue;
    std::vector<int> running(experts, 0);
    for (size_t i = 0; i < active.size(); ++i)
      used[r.rank[i]] += active[i], running[r.expert[i]] += active[i];
    CHECK(*std::max_element(used.begin(), used.end()) <= limit);
    CHECK(*std::min_element(running.begin(), running.end()) >= 1);
  }
  CHECK(possible > 20);
  CHECK(impossible > 5);
}

TEST(connected_placements_join_all_ranks) {
  for (uint32_t seed = 0; seed < 10; ++seed) {
    const Grid g{64, 80, 1, 1, 8};
    std::vector<int32_t> placement(g.slots);
    const std::vector<double> load = lognormal(g.experts, 1.0, seed);
    rebalance_layer(g, load.data(), {nullptr, -1, true}, placement.data());
    CHECK(heaviest(g, load, placement) < 1.01);
    std::vector<int> part(g.ranks);
    std::iota(part.begin(), part.end(), 0);
    for (int pass = 0; pass < g.ranks; ++pass)
      for (int i = 0; i < g.slots; ++i)
        for (int j = 0; j < g.slots; ++j)
          if (placement[i] == placement[j])
            part[i / 10] = part[j / 10] = std::min(part[i / 10], part[j / 10]);
    CHECK_EQ(*std::max_element(part.begin(), part.end()), 0);
  }
}
