// The source's part of the plan: from topk_ids to ordinals and stage slots. Touches private memory only.
//
//   sort_picks        every token's picks in ascending expert order; refuses invalid ids before anything
//                     moves
//   number_channel    ordinals and stage slots of one channel's rows, continued from the counts of the
//                     channels before it
//   count_picks       the whole plan by one group, channel after channel
//   number_from_zero, the same by many groups at once: numbers every channel from 0, computes prefix sums of
//   sum_channels,     the counts over the channels, and shifts the numbers of every channel by the counts
//   shift_channel     before it
//
// The lanes divide the tokens in sort_picks, and the experts, ranks or nodes in number_channel. So there are
// no atomics, and the result is a pure function of the input.
#pragma once
#include "exec/group.hpp"
#include "protocol/views.hpp"

namespace moecomm {

template <Group G>
MOE_HD Status sort_picks(G g, const DispatchArgs& a, int begin, int end) {
  const int k_max = a.b.shape.top_k;
  Status bad;
  for (int t = begin + g.lane(); t < end; t += g.size()) {
    Pick* pick = a.plan.pick + int64_t{t} * k_max;
    int n = 0;
    for (int k = 0; k < k_max; ++k) {
      const int64_t at = int64_t{t} * k_max + k;
      const int64_t id = a.ids64 ? a.ids64[at] : a.ids32[at];
      if (id == -1) continue;
      if (id < 0 || id >= a.b.shape.num_experts) {
        bad = bad_pick(BadInput::id_out_of_range, t, id);
        break;
      }
      int i = n++;
      for (; i > 0 && pick[i - 1].expert > id; --i) pick[i] = pick[i - 1];
      pick[i].expert = static_cast<uint16_t>(id);
      pick[i].k = static_cast<uint16_t>(k);
      if (i > 0 && pick[i - 1].expert == id) bad = bad_pick(BadInput::id_twice, t, id);
    }
    a.plan.picks[t] = static_cast<uint8_t>(n);
    if (!bad.ok()) break;
  }
  return first_failure(g, bad);
}

// `counts` [N, ints], in and out, with the fields of count blocks: rows of the channels before this one; then
// including the rows of this one.
template <Group G>
MOE_HD void number_channel(G g, const DispatchArgs& a, int channel, int32_t* counts) {
  const BufferView& b = a.b;
  const int nodes = b.geometry.nodes(), k_max = b.shape.top_k;
  const int per_rank = b.experts_per_rank(), per_node = b.experts_per_node(), p = b.geometry.ranks_per_node;
  const PlanView& plan = a.plan;
  const int begin = channel_begin(plan.tokens, channel, b.shape.channels),
            end = channel_begin(plan.tokens, channel + 1, b.shape.channels);
  const bool by_rank = plan.call.layout == RowLayout::rank;

  // A lane handles the experts e with e % size == lane.
  for (int t = begin; t < end; ++t) {
    Pick* pick = plan.pick + int64_t{t} * k_max;
    for (int i = 0; i < plan.picks[t]; ++i) {
      const int e = pick[i].expert;
      if (e % g.size() != g.lane()) continue;
      int32_t& n = counts[e / per_node * b.count.ints + b.count.experts + e % per_node];
      if (!by_rank) pick[i].ordinal = n;
      ++n;
    }
  }
  // A lane handles a subset of the owner ranks: rows in the rank layout, and their ordinals.
  for (int t = begin; t < end; ++t) {
    Pick* pick = plan.pick + int64_t{t} * k_max;
    int32_t* n = nullptr;
    for (int i = 0, last = -1; i < plan.picks[t]; ++i) {
      const int r = pick[i].expert / per_rank;
      if (r % g.size() != g.lane()) continue;
      if (r != last) {
        n = &counts[r / p * b.count.ints + b.count.ranks + r % p];
        ++*n;
        last = r;
      }
      if (by_rank) pick[i].ordinal = *n - 1;
    }
  }
  // A lane handles a subset of the nodes: stage slots in token order.
  for (int node = g.lane(); node < nodes; node += g.size()) {
    int32_t& next = counts[node * b.count.ints + b.count.rows];
    for (int t = begin; t < end; ++t) {
      const Pick* pick = plan.pick + int64_t{t} * k_max;
      bool wanted = false;
      for (int i = 0; i < plan.picks[t]; ++i) wanted |= pick[i].expert / per_node == node;
      plan.slot[int64_t{t} * nodes + node] = wanted ? next++ : -1;
    }
  }
}

namespace detail {

// The rows of a channel for a node are in stage slots [before, after).
MOE_HD inline void set_channel(const DispatchArgs& a, int node, int channel, int32_t before, int32_t after) {
  int32_t* first = a.plan.send_first + node * (a.b.shape.channels + 1);
  if (channel == 0) first[0] = before;
  first[channel + 1] = after;
  a.plan.blocks[node * a.b.count.ints + a.b.count.channels + channel] = after - before;
}

}  // namespace detail

template <Group G>
MOE_HD void count_picks(G g, const DispatchArgs& a) {
  const BufferView& b = a.b;
  const int nodes = b.geometry.nodes();
  for (int i = g.lane(); i < nodes * b.count.ints; i += g.size()) a.plan.blocks[i] = 0;
  g.sync();
  for (int c = 0; c < b.shape.channels; ++c) {
    number_channel(g, a, c, a.plan.blocks);
    for (int node = g.lane(); node < nodes; node += g.size()) {  // the lane that counted it
      const int32_t* first = a.plan.send_first + node * (b.shape.channels + 1);
      detail::set_channel(a, node, c, c == 0 ? 0 : first[c],
                          a.plan.blocks[node * b.count.ints + b.count.rows]);
    }
  }
  g.sync();
}

// -- by many groups: `channel_counts` [C, N, ints] is scratch with one row per channel; a barrier separates
// the steps

template <Group G>
MOE_HD void number_from_zero(G g, const DispatchArgs& a, int channel, int32_t* channel_counts) {
  const int entries = a.b.geometry.nodes() * a.b.count.ints;
  int32_t* counts = channel_counts + int64_t{channel} * entries;
  for (int i = g.lane(); i < entries; i += g.size()) counts[i] = 0;
  g.sync();
  number_channel(g, a, channel, counts);
  g.sync();
}

// Entries part, part + parts, ... of the count blocks: writes the totals, and to `channel_counts` the counts
// before every channel. The lanes divide the channels into contiguous ranges.
template <Group G>
MOE_HD void sum_channels(G g, const DispatchArgs& a, int32_t* channel_counts, int part, int parts) {
  const BufferView& b = a.b;
  const int entries = b.geometry.nodes() * b.count.ints, channels = b.shape.channels;
  const int begin = channel_begin(channels, g.lane(), g.size()),
            end = channel_begin(channels, g.lane() + 1, g.size());
  for (int entry = part; entry < entries; entry += parts) {
    const int node = entry / b.count.ints, field = entry % b.count.ints;
    if (field != b.count.rows && (field < b.count.experts || field >= b.count.channels)) continue;
    int32_t mine = 0;
    for (int c = begin; c < end; ++c) mine += channel_counts[int64_t{c} * entries + entry];
    int32_t before = 0, total = 0;
    for (int lane = 0; lane < g.size(); ++lane) {
      const int32_t theirs = g.broadcast(mine, lane);
      if (lane < g.lane()) before += theirs;
      total += theirs;
    }
    for (int c = begin; c < end; ++c) {
      int32_t& count = channel_counts[int64_t{c} * entries + entry];
      const int32_t own = count;
      count = before;
      before += own;
      if (field == b.count.rows) detail::set_channel(a, node, c, before - own, before);
    }
    if (g.lane() == 0) a.plan.blocks[entry] = total;
  }
  g.sync();
}

template <Group G>
MOE_HD void shift_channel(G g, const DispatchArgs& a, int channel, const int32_t* channel_counts) {
  const BufferView& b = a.b;
  const int nodes = b.geometry.nodes(), k_max = b.shape.top_k;
  const int per_rank = b.experts_per_rank(), per_node = b.experts_per_node(), p = b.geometry.ranks_per_node;
  const int32_t* before = channel_counts + int64_t{channel} * nodes * b.count.ints;
  const int begin = channel_begin(a.plan.tokens, channel, b.shape.channels),
            end = channel_begin(a.plan.tokens, channel + 1, b.shape.channels);
  const bool by_rank = a.plan.call.layout == RowLayout::rank;
  for (int i = begin * k_max + g.lane(); i < end * k_max; i += g.size()) {
    if (i % k_max >= a.plan.picks[i / k_max]) continue;
    Pick& pick = a.plan.pick[i];
    const int e = pick.expert, r = e / per_rank;
    pick.ordinal += by_rank ? before[r / p * b.count.ints + b.count.ranks + r % p]
                            : before[e / per_node * b.count.ints + b.count.experts + e % per_node];
  }
  for (int i = begin * nodes + g.lane(); i < end * nodes; i += g.size())
    if (a.plan.slot[i] >= 0) a.plan.slot[i] += before[i % nodes * b.count.ints + b.count.rows];
  g.sync();
}

}  // namespace moecomm
