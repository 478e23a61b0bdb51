// Plan: from topk_ids to the final place of every row. Source side; touches private memory only.
//
//   sort_picks   every token's picks in ascending expert order; refuses bad ids before anything moves
//   count_picks  ordinals (position among the rows of this source), staging slots, count blocks
//
// Lanes own tokens in the first and experts/ranks/nodes in the second, so there are no atomics and the
// result is a pure function of the input.
#pragma once
#include "exec/group.hpp"
#include "protocol/views.hpp"

namespace moecomm {

// Details of an `invalid` status: `expected` is the token, `got` the id.
enum BadPick : int32_t { kIdOutOfRange = 1, kIdTwice = 2 };

MOE_HD inline Status bad_pick(BadPick why, int token, int64_t id) {
  return {Code::invalid, Phase::none, -1, why, static_cast<uint64_t>(token), static_cast<uint64_t>(id)};
}

template <Group G>
MOE_HD Status sort_picks(G g, const DispatchArgs& a) {
  const int k_max = a.b.shape.top_k;
  Status bad;
  for (int t = g.lane(); t < a.plan.tokens; t += g.size()) {
    Pick* pick = a.plan.pick + int64_t{t} * k_max;
    int n = 0;
    for (int k = 0; k < k_max; ++k) {
      const int64_t at = int64_t{t} * k_max + k;
      const int64_t id = a.ids64 ? a.ids64[at] : a.ids32[at];
      if (id == -1) continue;
      if (id < 0 || id >= a.b.shape.num_experts) {
        bad = bad_pick(kIdOutOfRange, t, id);
        break;
      }
      int i = n++;
      for (; i > 0 && pick[i - 1].expert > id; --i) pick[i] = pick[i - 1];
      pick[i].expert = static_cast<uint16_t>(id);
      pick[i].k = static_cast<uint16_t>(k);
      if (i > 0 && pick[i - 1].expert == id)
        bad = bad_pick(kIdTwice, t, id);
    }
    a.plan.picks[t] = static_cast<uint8_t>(n);
    if (!bad.ok()) break;
  }
  return first_failure(g, bad);
}

template <Group G>
MOE_HD void count_picks(G g, const DispatchArgs& a) {
  const BufferView& b = a.b;
  const int nodes = b.geometry.nodes(), k_max = b.shape.top_k, channels = b.shape.channels;
  const int per_rank = b.experts_per_rank(), per_node = b.experts_per_node(), p = b.geometry.ranks_per_node;
  const PlanView& plan = a.plan;
  for (int i = g.lane(); i < nodes * b.count.ints; i += g.size()) plan.blocks[i] = 0;
  g.sync();

  // Lane owns experts e with e % size == lane (one lane owns all of them).
  const bool by_rank = plan.call.layout == RowLayout::rank;
  for (int t = 0; t < plan.tokens; ++t) {
    Pick* pick = plan.pick + int64_t{t} * k_max;
    for (int i = 0; i < plan.picks[t]; ++i) {
      const int e = pick[i].expert;
      if (e % g.size() != g.lane()) continue;
      int32_t& n = plan.blocks[e / per_node * b.count.ints + b.count.experts + e % per_node];
      if (!by_rank) pick[i].ordinal = n;
      ++n;
    }
  }
  // Lane owns destination ranks: rows after dedup, and their ordinals in the rank layout.
  for (int t = 0; t < plan.tokens; ++t) {
    Pick* pick = plan.pick + int64_t{t} * k_max;
    int32_t* n = nullptr;
    for (int i = 0, last = -1; i < plan.picks[t]; ++i) {
      const int r = pick[i].expert / per_rank;
      if (r % g.size() != g.lane()) continue;
      if (r != last) {
        n = &plan.blocks[r / p * b.count.ints + b.count.ranks + r % p];
        ++*n;
        last = r;
      }
      if (by_rank) pick[i].ordinal = *n - 1;
    }
  }
  // Lane owns destination nodes: staging slots in token order, rows per channel.
  for (int node = g.lane(); node < nodes; node += g.size()) {
    int32_t* per_channel = plan.blocks + node * b.count.ints + b.count.channels;
    int32_t next = 0;
    for (int c = 0; c < channels; ++c) {
      const int32_t before = next;
      for (int t = channel_begin(plan.tokens, c, channels); t < channel_begin(plan.tokens, c + 1, channels); ++t) {
        const Pick* pick = plan.pick + int64_t{t} * k_max;
        bool wanted = false;
        for (int i = 0; i < plan.picks[t]; ++i) wanted |= pick[i].expert / per_node == node;
        plan.slot[int64_t{t} * nodes + node] = wanted ? next++ : -1;
      }
      per_channel[c] = next - before;
    }
  }
  g.sync();
}

}  // namespace moecomm
