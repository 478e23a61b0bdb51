// The end of dispatch.
//
//   arrive  (receiver)  wait for all gateways, copy rows that several local experts get, zero the padding
#pragma once
#include "protocol/forward.hpp"

namespace moecomm {

namespace detail {

// Waits until all gateways of the node have forwarded their rows, or have announced why they did not. Even
// when the call is refused, gateways whose node had room still store rows here, so this rank waits for all of
// them.
template <Group G, Fabric<G> F>
MOE_HD Status await_gateways(G g, F f, const DispatchArgs& a) {
  const Geometry& geo = a.b.geometry;
  return leader(g, [&] {
    Status refused;
    for (int i = 0; i < geo.ranks_per_node; ++i) {
      MOE_TRY(f.wait_node(a.b.node.arrive + i, a.consumed->dispatches, Phase::arrive,
                          geo.rank_at(geo.node(), i)));
      const Verdict& v = f.window(geo.local(), a.b.node.verdicts)[i];
      if (!v.ok() && refused.ok()) refused = status_of(v);
    }
    return refused;
  });
}

// Part `part` of `parts` of the rows of this rank's block. Ranges of rows are assigned to the parts
// round-robin, and the next range continues where the last one ended, so that many short ranges are spread
// too.
struct BlockShare {
  const DispatchArgs& a;
  const BlockLayout& l;  // relative to the window
  char* window;
  int64_t rows;  // with padding
  int part, parts;
  int next_part = 0;
  uint64_t replicated = 0;
  Status wrong = {};  // the first corrupt row that this lane has found

  MOE_HD bool by_rank() const { return a.plan.call.layout == RowLayout::rank; }
  // The first row of this part in [begin, end), whose rows are assigned `length` at a time.
  MOE_HD int64_t first_of(int64_t begin, int64_t end, int64_t length) {
    const int64_t first = begin + (part + parts - next_part) % parts * length;
    next_part = static_cast<int>((next_part + (end - begin + length - 1) / length) % parts);
    return first;
  }
};

// Clears rows [begin, end), which are padding.
template <Group G, Fabric<G> F>
MOE_HD void clear_rows(G g, F f, BlockShare& s, int64_t begin, int64_t end) {
  const CallShape& call = s.a.plan.call;
  const bool by_rank = s.by_rank();
  for (int64_t r = s.first_of(begin, end, 1); r < end; r += s.parts) {
    f.zero_row(g, s.l.rows.in(s.window) + r * call.row_bytes, call.row_bytes);
    zero_scales(g, f, call, s.l.scales.in(s.window), s.rows, r);
    if (by_rank) clear_picks(g, s.window, s.l, r, s.a.b.shape.top_k);
    if (g.lane() != 0) continue;
    s.l.source.in(s.window)[r] = -1;
    if (!by_rank) s.l.weights.in(s.window)[r] = 0.0f;
  }
}

template <Group G, Fabric<G> F>
MOE_HD void replicate_row(G g, F f, const BlockShare& s, int64_t to, int64_t from) {
  const CallShape& call = s.a.plan.call;
  char* rows = s.l.rows.in(s.window);
  f.copy_row(g, rows + to * call.row_bytes, rows + from * call.row_bytes, call.row_bytes);
  copy_scales(g, f, call, s.l.scales.in(s.window), s.rows, to, from);
}

// Completes rows [begin, end): those whose payload is in another row of the block are copied from there.
// Works on as many rows at a time as there are lanes; each lane loads the origin of one.
template <Group G, Fabric<G> F>
MOE_HD void complete_rows(G g, F f, BlockShare& s, int64_t begin, int64_t end) {
  const bool by_rank = s.by_rank();
  const int32_t* origin = s.l.origin.in(s.window);
  for (int64_t first = s.first_of(begin, end, g.size()); first < end; first += int64_t{s.parts} * g.size()) {
    const int64_t mine = first + g.lane(), last = first + g.size() < end ? first + g.size() : end;
    const int32_t from = by_rank || mine >= end ? -1 : origin[mine];
    for (int64_t r = first; !by_rank && r < last; ++r) {
      const int32_t o = g.broadcast(from, static_cast<int>(r - first));
      s.replicated += o != r && o != -1 - r;
      if (o >= 0 && o != r) replicate_row(g, f, s, r, o);
    }
    if (!s.a.b.check) continue;
    f.finish_rows(g);
    verify::arrived_rows(g, s.a, s.window, s.l, s.rows, first, last, s.wrong);
  }
}

}  // namespace detail

// Part `part` of `parts`: the rows of the block are divided among the groups.
template <Group G, Fabric<G> F>
MOE_HD Status arrive(G g, F f, const DispatchArgs& a, int part, int parts) {
  const BufferView& b = a.b;
  MOE_TRY(detail::await_gateways(g, f, a));
  const int local = b.geometry.local();
  const int64_t real = a.plan.rank_rows[local];
  const int64_t rows = a.plan.call.capacity >= 0 ? a.plan.call.capacity : real;
  detail::BlockShare share{a, a.target[local], f.window(local), rows, part, parts};
  if (b.check && part == 0 && g.lane() == 0) share.wrong = verify::announced_rows(a, share.window, share.l);
  if (share.by_rank()) {
    if (b.check) detail::complete_rows(g, f, share, 0, real);
  } else {
    int64_t row = 0;
    for (int e = 0; e < b.experts_per_rank(); ++e) {
      const int64_t end = row + a.plan.tokens_per_expert[e], padded = row + a.plan.rows_per_expert[e];
      detail::complete_rows(g, f, share, row, end);
      detail::clear_rows(g, f, share, end, padded);
      row = padded;
    }
  }
  detail::clear_rows(g, f, share, real, rows);
  if (g.lane() == 0) f.counters().replicated_rows += share.replicated;
  g.sync();
  return b.check ? first_failure(g, share.wrong) : Status{};
}

}  // namespace moecomm
