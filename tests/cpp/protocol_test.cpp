// Dispatch and combine with all ranks: one lane or a team of lanes per rank, several rounds without a pause
// between them, and every byte compared with the oracle in world.hpp.
#include "rounds.hpp"

using namespace world;

namespace {

// A rank is one group, or has the groups and latches of the cuda world's schedule.
struct HostRunner {
  Status dispatch(World& w, int r, const Case& c, const DispatchWork& work) {
    RankState& me = w.rank(r);
    if (c.workers == 0)
      return execute(c.lanes,
                     [&](auto group) { return run_dispatch(group, me.fabric(), work.args, work.offer); });
    return run_groups(me, c.workers, c.senders, c.lanes,
                      [&](auto group, auto fabric, auto latches, GroupIndex self) {
                        return dispatch_group(group, fabric, latches, work, self, [] {});
                      });
  }
  Status combine(World& w, int r, const Case& c, const CombineArgs& args) {
    RankState& me = w.rank(r);
    if (c.workers == 0)
      return execute(c.lanes, [&](auto group) { return run_combine(group, me.fabric(), args); });
    return run_groups(me, c.workers, c.senders, c.lanes,
                      [&](auto group, auto fabric, auto latches, GroupIndex self) {
                        return combine_group(group, fabric, latches, args, self);
                      });
  }
};

void run_case(const Case& c) { world::run_case(c, HostRunner{}); }

const std::pair<int, int> kGeometries[] = {{1, 1}, {2, 1}, {1, 3}, {3, 2}, {2, 4}, {5, 1}};

std::vector<Case> geometries(int lanes) {
  std::vector<Case> all;
  for (const auto& [nodes, per_node] : kGeometries)
    for (RowLayout layout : {RowLayout::expert, RowLayout::rank})
      all.push_back({.nodes = nodes, .per_node = per_node, .lanes = lanes, .layout = layout});
  return all;
}

std::vector<Case> features(int lanes) {
  std::vector<Case> all;
  for (RowLayout layout : {RowLayout::expert, RowLayout::rank}) {
    const Case base{.lanes = lanes, .layout = layout};
    Case c = base;
    c.spare = 3;
    all.push_back(c);
    c = base;
    c.quantized = true;
    c.hidden = 144;
    c.channels = 3;
    all.push_back(c);
    c = base;
    c.chunk_rows = 1;
    all.push_back(c);
    c = base;
    c.check = true;
    all.push_back(c);
    c = base;
    c.check = true;
    c.quantized = true;
    c.hidden = 144;
    all.push_back(c);
    c = base;
    c.weights = false;
    c.type = DType::f32;
    all.push_back(c);
    c = base;
    c.fused = ScaleKind::f32;
    c.by_column = true;
    c.hidden = 400;
    c.nodes = 3;
    c.wire = Wire::logfmt10;
    all.push_back(c);
    c = base;
    c.fused = ScaleKind::ue8m0;
    c.check = true;
    c.hidden = 144;
    c.channels = 3;
    c.wire = Wire::fp8;
    all.push_back(c);
    c = base;
    c.fused = ScaleKind::ue8m0;
    c.nodes = 1;
    c.hidden = 272;
    c.spare = 2;
    c.by_column = true;
    all.push_back(c);
    c = base;
    c.skew = 1;
    all.push_back(c);
    c = base;
    c.skew = 2;
    c.channels = 5;
    all.push_back(c);
    c = base;
    c.top_k = 12;
    c.experts_per_rank = 4;
    all.push_back(c);
    c = base;
    c.top_k = 32;
    c.experts_per_rank = 11;
    c.channels = 1;
    all.push_back(c);
  }
  Case c{.lanes = lanes, .alignment = 4};
  all.push_back(c);
  c.spare = 0;
  all.push_back(c);
  c.check = true;
  all.push_back(c);
  return all;
}

// Ids that depend on the picks of all ranks.
std::vector<Case> chosen(int lanes) {
  std::vector<Case> all;
  for (const auto& [nodes, per_node] : kGeometries) {
    const Case base{.nodes = nodes, .per_node = per_node, .lanes = lanes, .rounds = 5, .chosen = 1};
    all.push_back(base);
    Case c = base;
    c.chosen = 2;
    all.push_back(c);
    c.layout = RowLayout::rank;
    c.check = true;
    all.push_back(c);
    c = base;
    c.check = true;
    c.skew = 2;
    c.channels = 5;
    all.push_back(c);
    c = base;
    c.skew = 1;
    c.alignment = 4;
    c.spare = 3;
    all.push_back(c);
  }
  return all;
}

// The same with the schedule of the cuda world.
std::vector<Case> concurrent(std::vector<Case> cases, int workers, int senders) {
  for (Case& c : cases) {
    c.workers = workers;
    c.senders = c.nodes == 1 ? workers : senders;
  }
  return cases;
}

}  // namespace

TEST_CASES(lane_geometries, geometries(0)) { run_case(value); }
TEST_CASES(lane_features, features(0)) { run_case(value); }
TEST_CASES(team_of_2_geometries, geometries(2)) { run_case(value); }
TEST_CASES(team_of_3_features, features(3)) { run_case(value); }
TEST_CASES(lane_chosen, chosen(0)) { run_case(value); }
TEST_CASES(team_of_2_chosen, chosen(2)) { run_case(value); }
TEST_CASES(concurrent_geometries, concurrent(geometries(0), 3, 3)) { run_case(value); }
TEST_CASES(concurrent_features, concurrent(features(0), 4, 2)) { run_case(value); }
TEST(concurrent_warps) {
  run_case({.nodes = 2,
            .per_node = 1,
            .lanes = 32,
            .channels = 3,
            .hidden = 256,
            .rounds = 2,
            .workers = 2,
            .senders = 1});
}
TEST(team_of_1) { run_case({.lanes = 1}); }
TEST(team_of_8) { run_case({.nodes = 2, .per_node = 1, .lanes = 8, .hidden = 512, .type = DType::f32}); }
