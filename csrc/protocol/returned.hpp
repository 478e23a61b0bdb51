// The f32 values that combine returns to the tokens besides their rows: a value for each pick, or sums of
// values.
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/views.hpp"

namespace moecomm::detail {

// Writes one token's `back` values from this node's ranks to returned[k] of their picks, and leaves the
// others unchanged. With sums_back, adds the values of the token's rows to them instead.
template <LaneFabric F>
MOE_HD void gather_returned(F f, const CombineArgs& a, int n, int i, float* returned) {
  const int k_max = a.b.shape.top_k;
  const int64_t at = a.b.row_index(n, i);
  const Place* place = a.plan.place + at * k_max;
  const bool by_rank = a.plan.call.layout == RowLayout::rank;
  for (int j = 0; j < a.plan.row_picks[at]; ++j) {
    const Place p = place[j];
    const Offset<float> back = a.boards[p.local].back;
    if (a.sums_back) {
      if (!back || (by_rank && j > 0 && place[j - 1].local == p.local)) continue;  // one row per rank
      const float* values = f.window(p.local, back) + int64_t{p.row} * (by_rank ? k_max : 1);
      for (int k = 0; k < (by_rank ? k_max : 1); ++k) returned[k] += values[k];
      continue;
    }
    const int64_t index = by_rank ? int64_t{p.row} * k_max + p.k : p.row;
    returned[p.k] = back ? f.window(p.local, back)[index] : 0.0f;
  }
}

// One lane writes the values of token t's picks to its row of a.returned; with sums_back, the sums of its
// rows' values, nodes in ascending order.
template <LaneFabric F>
MOE_HD void collect_returned(F f, const CombineArgs& a, int t) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), nodes = b.geometry.nodes();
  const int k_max = b.shape.top_k, per_node = b.experts_per_node();
  float* out = a.returned + int64_t{t} * k_max;
  for (int k = 0; k < k_max; ++k) out[k] = 0.0f;
  for (int n = 0; a.sums_back && n < nodes; ++n) {
    const int slot = a.plan.slot_of(t, n, nodes);
    if (slot < 0) continue;
    if (n == own) {
      gather_returned(f, a, own, slot, out);
      continue;
    }
    const float* values = f.rail(b.rail.returned) + (b.remote_row(n, own) + slot) * k_max;
    for (int k = 0; k < k_max; ++k) out[k] += values[k];
  }
  if (a.sums_back) return;
  const int own_slot = a.plan.slot_of(t, own, nodes);
  if (own_slot >= 0) gather_returned(f, a, own, own_slot, out);
  const Pick* pick = a.plan.pick + int64_t{t} * k_max;
  for (int i = 0; i < a.plan.picks[t]; ++i) {
    const int n = pick[i].expert / per_node;
    if (n == own) continue;
    const uint64_t at = b.remote_row(n, own) + a.plan.slot_of(t, n, nodes);
    out[pick[i].k] = f.rail(b.rail.returned)[at * k_max + pick[i].k];
  }
}

}  // namespace moecomm::detail
