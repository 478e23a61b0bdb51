// The end of dispatch.
//
//   arrive  (receiver)  wait for all gateways, copy rows that several own experts want, zero the padding
#pragma once
#include "protocol/forward.hpp"

namespace moecomm {

// Part `part` of `parts`: the receiver's own work is shared out by rows.
template <Group G, Fabric<G> F>
MOE_HD Status arrive(G g, F f, const DispatchArgs& a, int part, int parts) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const CallShape& call = a.plan.call;
  MOE_TRY(leader(g, [&] {
    Status refused;  // gateways of a node that would have had room store rows here all the same: they are
                     // awaited
    for (int i = 0; i < geo.ranks_per_node; ++i) {
      MOE_TRY(
          f.wait_node(b.node.arrive + 8 * i, a.book->dispatches, Phase::arrive, geo.rank_at(geo.node(), i)));
      const Verdict& v = reinterpret_cast<const Verdict*>(f.window(geo.local(), b.node.verdicts))[i];
      if (v.code != 0 && refused.ok()) refused = status_of(v);
    }
    return refused;
  }));

  char* window = f.window(geo.local(), 0);
  const BlockLayout& l = a.target[geo.local()];
  const int64_t real = a.plan.rank_rows[geo.local()];
  const int64_t rows = call.capacity >= 0 ? call.capacity : real;
  const bool by_rank = call.layout == RowLayout::rank;
  const int32_t* origin = reinterpret_cast<const int32_t*>(window + l.origin);
  int64_t* source = reinterpret_cast<int64_t*>(window + l.source);
  uint64_t replicated = 0;
  const auto copy = [&](int64_t to, int64_t from) {
    f.copy_row(g, window + l.rows + to * call.row_bytes, window + l.rows + from * call.row_bytes,
               call.row_bytes);
    detail::copy_scales(g, f, call, window + l.scales, rows, to, from);
  };
  // Stretches of rows are dealt out in turn, one stretch after another, so that many short ones are shared
  // too.
  int dealt = 0;
  const auto deal = [&](int64_t begin, int64_t end, int64_t length) {
    const int64_t first = begin + (part + parts - dealt) % parts * length;
    dealt = static_cast<int>((dealt + (end - begin + length - 1) / length) % parts);
    return first;
  };
  const auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t r = deal(begin, end, 1); r < end; r += parts) {
      f.zero_row(g, window + l.rows + r * call.row_bytes, call.row_bytes);
      detail::zero_scales(g, f, call, window + l.scales, rows, r);
      if (by_rank) detail::clear_picks(g, window, l, r, b.shape.top_k);
      if (g.lane() != 0) continue;
      source[r] = -1;
      if (!by_rank) reinterpret_cast<float*>(window + l.weights)[r] = 0.0f;
    }
  };
  // As many rows at a time as there are lanes: each lane looks where one of them comes from.
  Status wrong;
  if (b.check && part == 0 && g.lane() == 0) wrong = verify::announced_rows(a, window, l);
  const auto complete = [&](int64_t begin, int64_t end) {
    for (int64_t first = deal(begin, end, g.size()); first < end; first += int64_t{parts} * g.size()) {
      const int64_t mine = first + g.lane(), last = first + g.size() < end ? first + g.size() : end;
      const int32_t from = by_rank || mine >= end ? -1 : origin[mine];
      for (int64_t r = first; !by_rank && r < last; ++r) {
        const int32_t o = g.broadcast(from, static_cast<int>(r - first));
        replicated += o != r && o != -1 - r;
        if (o >= 0 && o != r) copy(r, o);
      }
      if (!b.check) continue;
      f.settle(g);
      verify::arrived_rows(g, a, window, l, rows, first, last, wrong);
    }
  };
  if (by_rank) {
    if (b.check) complete(0, real);
  } else {
    int64_t row = 0;
    for (int e = 0; e < b.experts_per_rank(); ++e) {
      const int64_t end = row + a.plan.tokens_per_expert[e], padded = row + a.plan.rows_per_expert[e];
      complete(row, end);
      clear(end, padded);
      row = padded;
    }
  }
  clear(real, rows);
  if (g.lane() == 0) f.counters().replicated_rows += replicated;
  g.sync();
  return b.check ? first_failure(g, wrong) : Status{};
}

}  // namespace moecomm
