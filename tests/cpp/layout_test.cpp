// Layouts: parts do not overlap, are aligned, and are within the total size.
#include <algorithm>

#include "base/layout.hpp"
#include "check.hpp"

using namespace moecomm;

namespace {

struct Part {
  uint64_t begin, bytes, alignment;
};

void check_disjoint(std::vector<Part> parts, uint64_t total) {
  std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.begin < b.begin; });
  uint64_t end = 0;
  for (const Part& p : parts) {
    if (p.bytes == 0) continue;
    CHECK(p.begin >= end);
    CHECK_EQ(p.begin % p.alignment, 0u);
    end = p.begin + p.bytes;
  }
  CHECK(end <= total);
}

struct Case {
  Geometry g;
  Shape s;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (int nodes : {1, 2, 5})
    for (int p : {1, 3, 8})
      for (int top_k : {1, 8, 32})
        for (DType type : {DType::bf16, DType::f64}) {
          Shape s{.hidden = 72,
                  .dtype = type,
                  .num_experts = 4 * nodes * p,
                  .top_k = top_k,
                  .max_tokens = 37,
                  .channels = 3,
                  .arena_bytes = 12345,
                  .logical_experts = top_k == 8 ? 57 : 0};
          all.push_back({{nodes * p - 1, nodes * p, p}, s});
        }
  return all;
}

}  // namespace

TEST_CASES(node_windows, cases()) {
  const auto& [g, s] = value;
  const NodeLayout l = node_layout(g, s);
  const uint64_t p = g.ranks_per_node;
  check_disjoint({{0, sizeof(MemoryHeader), 64},
                  {l.counts.value, 8 * p, 8},
                  {l.arrive.value, 8 * p, 8},
                  {l.ready.value, 8 * p, 8},
                  {l.done.value, 8 * p, 8},
                  {l.faults.value, sizeof(FaultWord) * p, 8},
                  {l.offers.value, sizeof(Offer) * p, 8},
                  {l.verdicts.value, sizeof(Verdict) * p, 8},
                  {l.board.value, sizeof(RowsBoard), 8},
                  {l.tables.value, uint64_t{4} * count_layout(g, s).ints * g.size * s.count_halves(), 16},
                  {l.arena.value, s.arena_bytes, 4096}},
                 l.bytes);
}

TEST_CASES(rail_regions, cases()) {
  const auto& [g, s] = value;
  const RailLayout l = rail_layout(g, s);
  const uint64_t n = g.nodes(), rows = (n - 1) * s.max_tokens;
  check_disjoint({{0, sizeof(MemoryHeader), 64},
                  {l.enter.value, 8 * n, 8},
                  {l.rows.value, 8 * n * s.channels, 8},
                  {l.verdict.value, 8 * n, 8},
                  {l.back.value, 8 * n * s.channels, 8},
                  {l.faults.value, sizeof(FaultWord) * n, 8},
                  {l.blocks.value, uint64_t{4} * count_layout(g, s).ints * n * s.count_halves(), 16},
                  {l.verdicts.value, sizeof(Verdict) * n, 8},
                  {l.verdict_out.value, sizeof(Verdict), 8},
                  {l.fault_out.value, sizeof(FaultWord), 8},
                  {l.metas.value, n * s.max_tokens * meta_bytes(s.top_k), 16},
                  {l.metas_out.value, rows * meta_bytes(s.top_k), 16},
                  {l.sums.value, 8 * rows, 8},
                  {l.sums_out.value, 8 * rows, 8},
                  {l.returned.value, 4 * rows * s.top_k, 4},
                  {l.returned_out.value, 4 * rows * s.top_k, 4},
                  {l.area_a.value, rows * s.slot_bytes(), 16},
                  {l.area_b.value, rows * s.slot_bytes(), 16}},
                 l.bytes);
  CHECK(s.slot_bytes() >= s.combine_row_bytes());
  CHECK(s.slot_bytes() >= static_cast<uint64_t>(s.hidden) + s.scale_bytes());
}

TEST_CASES(blocks, cases()) {
  const Shape& s = value.s;
  for (RowLayout layout : {RowLayout::expert, RowLayout::rank})
    for (uint64_t rows : {0, 1, 131})
      for (uint64_t scales : {uint64_t{0}, s.scale_bytes()}) {
        const CallShape call{.layout = layout, .row_bytes = s.combine_row_bytes(), .scale_bytes = scales};
        const BlockLayout l = block_layout(rows, call, s.top_k);
        const bool by_rank = layout == RowLayout::rank;
        const uint64_t k = by_rank ? s.top_k : 1;
        check_disjoint({{l.rows.value, rows * call.row_bytes, 16},
                        {l.scales.value, rows * scales, 4},
                        {l.weights.value, 4 * rows * k, 4},
                        {l.ids.value, by_rank ? 8 * rows * k : 0, 8},
                        {l.origin.value, by_rank ? 0 : 4 * rows, 4},
                        {l.source.value, 8 * rows, 8},
                        {l.sums.value, 8 * rows, 8}},
                       l.bytes);
        const OutputLayout o = output_layout(rows, s);
        check_disjoint({{o.rows.value, rows * s.combine_row_bytes(), 16},
                        {o.weights.value, 4 * rows, 4},
                        {o.back.value, 4 * rows * s.top_k, 4}},
                       o.bytes);
      }
}

TEST(remote_indices_are_dense) {
  for (int nodes : {2, 3, 7})
    for (int at = 0; at < nodes; ++at) {
      std::vector<bool> seen(nodes - 1);
      for (int from = 0; from < nodes; ++from)
        if (from != at) {
          const uint64_t i = remote_index(from, at);
          REQUIRE(i < seen.size());
          CHECK(!seen[i]);
          seen[i] = true;
        }
    }
}
