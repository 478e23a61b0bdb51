// Combine: the way back on the same plan.
//
//   publish  (expert)   "my rows may be read", to the node; "I am in the call" and the wanted wire, over the rail
//   reduce   (gateway)  the node's rows of a token summed in FP32, ascending rank (and expert) order, one
//                       row per token back over the rail, coded as its source wants it     [per channel]
//   sum      (source)   own node's rows directly, other nodes' rows from staging, ascending node order,
//                       plus the bias; rounded once                                       [per channel]
//   finish   (all)      nobody reads my rows any more
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/dispatch.hpp"
#include "protocol/verify.hpp"
#include "protocol/views.hpp"

namespace moecomm {

namespace detail {

// Where a rail peer says how it calls: its Wire, and whether values go back to the picks' slots. A peer that waits for
// nothing here may be one combine ahead, hence the parity.
MOE_HD inline uint64_t wish_at(const CombineArgs& a, int node) {
  return a.b.rail.wires + 8 * ((a.book->combines & 1) * a.b.geometry.nodes() + node);
}
constexpr uint64_t kSlotsWished = 256;
MOE_HD inline Wire wished_wire(uint64_t wish) { return static_cast<Wire>(wish & (kSlotsWished - 1)); }

// Without this a rank that wants slots would read what an earlier call left in them.
MOE_HD inline Status same_slots(const CombineArgs& a, bool theirs, int rank, Phase phase) {
  return theirs == (a.slots != nullptr) ? Status{} : Status{Code::mismatch, phase, rank, 0, a.slots != nullptr, theirs};
}

}  // namespace detail

template <Group G, class F>
MOE_HD Status publish(G g, F f, const CombineArgs& a) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const int own = geo.node(), nodes = geo.nodes();
  if (g.lane() == 0) {
    ++a.book->enter;
    ++a.book->combines;
  }
  g.sync();
  if (b.check) {
    verify::sign_rows(g, f, a);
    g.sync();
  }
  return leader(g, [&] {
    RowsBoard* board = reinterpret_cast<RowsBoard*>(f.window(geo.local(), b.node.board));
    *board = a.mine;
    board->slots = a.slots != nullptr;
    for (int d = 0; d < geo.ranks_per_node; ++d) f.signal_node(d, b.node.ready + 8 * geo.local(), 1);
    uint64_t* wish = reinterpret_cast<uint64_t*>(f.rail(b.rail.wire_out));
    *wish = static_cast<uint64_t>(a.wire) | (a.slots ? detail::kSlotsWished : 0);
    for (int step = 1; step < nodes; ++step) {
      const int n = (own + step) % nodes;
      f.put(n, detail::wish_at(a, own), reinterpret_cast<const char*>(wish), 8);
      f.signal_rail(n, b.rail.enter + 8 * own, 1);
    }
    for (int d = 0; d < geo.ranks_per_node; ++d) {
      MOE_TRY(f.wait_node(b.node.ready + 8 * d, a.book->combines, Phase::publish, geo.rank_at(geo.node(), d)));
      a.boards[d] = *reinterpret_cast<const RowsBoard*>(f.window(d, b.node.board));
      MOE_TRY(detail::same_slots(a, a.boards[d].slots, geo.rank_at(geo.node(), d), Phase::publish));
    }
    return Status{};
  });
}

namespace detail {

// The rows that this node contributes to row i of source node n; counted as they are listed.
template <Group G, class F>
MOE_HD void add_node_terms(G g, F f, const CombineArgs& a, int n, int i, Terms& terms) {
  const int64_t at = int64_t{n} * a.b.shape.max_tokens + i;
  const Place* place = a.plan.place + at * a.b.shape.top_k;
  const uint64_t row_bytes = a.b.shape.combine_row_bytes();
  const bool by_rank = a.plan.call.layout == RowLayout::rank;
  uint64_t all = 0, remote = 0;
  for (int j = 0; j < a.plan.row_picks[at]; ++j) {
    const Place p = place[j];
    if (by_rank && j > 0 && place[j - 1].local == p.local) continue;   // one row per rank
    const RowsBoard board = a.boards[p.local];
    const char* window = f.window(p.local, 0);
    terms.add(g, window + board.rows + p.row * row_bytes,
              [&] { return board.weights ? reinterpret_cast<const float*>(window + board.weights)[p.row] : 1.0f; });
    ++all;
    remote += p.local != a.b.geometry.local();
  }
  terms.close_group();
  if (g.lane() != 0) return;
  Counters& count = f.counters();
  count.node.logical_rows += all;
  count.node.physical_rows += remote;
  count.node.logical_bytes += all * row_bytes;
  count.node.physical_bytes += remote * row_bytes;
}

// One token's values of `back` from this node's ranks, at their top-k slots; other slots are left alone.
template <class F>
MOE_HD void gather_slots(F f, const CombineArgs& a, int n, int i, float* slots) {
  const int k_max = a.b.shape.top_k;
  const int64_t at = int64_t{n} * a.b.shape.max_tokens + i;
  const Place* place = a.plan.place + at * k_max;
  const bool by_rank = a.plan.call.layout == RowLayout::rank;
  for (int j = 0; j < a.plan.row_picks[at]; ++j) {
    const Place p = place[j];
    const uint64_t back = a.boards[p.local].back;
    const int64_t index = by_rank ? int64_t{p.row} * k_max + p.k : p.row;
    slots[p.k] = back ? reinterpret_cast<const float*>(f.window(p.local, back))[index] : 0.0f;
  }
}

}  // namespace detail

template <Group G, class F>
MOE_HD Status reduce(G g, F f, const CombineArgs& a, int n, int channel) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const int own = geo.node(), channels = b.shape.channels;
  const int begin = a.plan.channel_first[n * (channels + 1) + channel];
  const int end = a.plan.channel_first[n * (channels + 1) + channel + 1];
  const uint64_t here = remote_index(n, own) * b.shape.max_tokens, there = remote_index(own, n) * b.shape.max_tokens;
  const uint64_t target = b.rail.area_b + there * b.shape.slot_bytes();
  char* straight = reach(f, n, target);   // where stores reach the peer, rows are summed right into its staging
  char* staged = straight ? straight : f.rail(b.rail.area_a) + here * b.shape.slot_bytes();
  uint64_t* sums = reinterpret_cast<uint64_t*>(f.rail(b.rail.sums_out)) + here;
  const int k_max = b.shape.top_k;
  float* slots = reinterpret_cast<float*>(f.rail(b.rail.slots_out)) + here * k_max;
  Counters& count = f.counters();
  MOE_TRY(leader(g, [&] { return f.wait_rail(b.rail.enter + 8 * n, a.book->enter, Phase::reduce, geo.rail_rank(n)); }));
  const uint64_t wish = *reinterpret_cast<const uint64_t*>(f.rail(detail::wish_at(a, n)));
  MOE_TRY(detail::same_slots(a, wish & detail::kSlotsWished, geo.rail_rank(n), Phase::reduce));
  const Wire wire = detail::wished_wire(wish);
  const uint64_t row_bytes = b.shape.wire_bytes(wire);

  // While one row is summed the next one's terms are known, so that the fabric can fetch them ahead.
  const auto terms_of = [&](int i) {
    Terms terms{&f.terms(i & 1)};
    if (i < end) detail::add_node_terms(g, f, a, n, i, terms);
    return terms;
  };
  Terms next = terms_of(begin);
  g.sync();
  for (int chunk = begin; chunk < end; chunk += b.shape.chunk_rows) {
    const int chunk_end = chunk + b.shape.chunk_rows < end ? chunk + b.shape.chunk_rows : end;
    for (int i = chunk; i < chunk_end; ++i) {
      const Terms now = next;
      next = terms_of(i + 1);
      if (b.check) MOE_TRY(verify::published_rows(g, f, a, n, i, Phase::reduce));
      char* row = staged + i * row_bytes;
      if (wire == Wire::plain) f.reduce_rows(g, row, now, &next, static_cast<const float*>(nullptr), b.shape.hidden, b.shape.dtype);
      else f.reduce_encode(g, row, wire, now, &next, b.shape.hidden, b.shape.dtype);
      g.sync();   // the list of `now` may be overwritten, that of `next` may be read
      if (a.slots && g.lane() == 0) detail::gather_slots(f, a, n, i, slots + int64_t{i} * k_max);
      if (b.check && g.lane() == 0) sums[i] = row_checksum(row, row_bytes, checksum_seed(a.book->combines, geo.rank, i));
    }
    g.sync();
    if (g.lane() == 0) {
      const int rows = chunk_end - chunk;
      if (!straight) f.put(n, target + chunk * row_bytes, staged + chunk * row_bytes, rows * row_bytes);
      if (b.check) f.put(n, b.rail.sums + 8 * (there + chunk), reinterpret_cast<const char*>(sums + chunk), 8 * rows);
      if (a.slots)
        f.put(n, b.rail.slots + 4 * k_max * (there + chunk), reinterpret_cast<const char*>(slots + int64_t{chunk} * k_max), 4 * k_max * rows);
      f.signal_rail(n, b.rail.back + 8 * (own * channels + channel), rows);
      count.rail.logical_rows += rows;
      count.rail.physical_rows += rows;
      count.rail.logical_bytes += rows * row_bytes;
      count.rail.physical_bytes += rows * row_bytes;
    }
  }
  g.sync();
  return {};
}

template <Group G, class F>
MOE_HD Status sum(G g, F f, const CombineArgs& a, int channel) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const int own = geo.node(), nodes = geo.nodes(), channels = b.shape.channels;
  const uint64_t row_bytes = b.shape.wire_bytes(a.wire);
  const int begin = channel_begin(a.plan.tokens, channel, channels);
  const int end = channel_begin(a.plan.tokens, channel + 1, channels);
  Counters& count = f.counters();
  const auto first_slot = [&](int n) { return a.plan.send_first[n * (channels + 1) + channel]; };
  const auto terms_of = [&](int t) {
    Terms terms{&f.terms(t & 1)};
    for (int n = 0; t < end && n < nodes; ++n) {
      const int slot = a.plan.slot[int64_t{t} * nodes + n];
      if (slot < 0) continue;
      if (n == own) detail::add_node_terms(g, f, a, n, slot, terms);
      else {
        const char* row = f.rail(b.rail.area_b) + remote_index(n, own) * b.shape.max_tokens * b.shape.slot_bytes() + slot * row_bytes;
        terms.add_wire(g, row, a.wire, b.shape.hidden);
        terms.close_group();
      }
    }
    return terms;
  };
  const auto collect_slots = [&](int t) {
    const int k_max = b.shape.top_k, per_node = b.experts_per_node();
    float* out = a.slots + int64_t{t} * k_max;
    for (int k = 0; k < k_max; ++k) out[k] = 0.0f;
    const int own_slot = a.plan.slot[int64_t{t} * nodes + own];
    if (own_slot >= 0) detail::gather_slots(f, a, own, own_slot, out);
    const Pick* pick = a.plan.pick + int64_t{t} * k_max;
    for (int i = 0; i < a.plan.picks[t]; ++i) {
      const int n = pick[i].expert / per_node;
      if (n == own) continue;
      const uint64_t at = remote_index(n, own) * b.shape.max_tokens + a.plan.slot[int64_t{t} * nodes + n];
      out[pick[i].k] = reinterpret_cast<const float*>(f.rail(b.rail.slots))[at * k_max + pick[i].k];
    }
  };
  const auto wait_token = [&](int t) {
    for (int n = 0; n < nodes; ++n) {
      const int slot = a.plan.slot[int64_t{t} * nodes + n];
      if (n == own || slot < 0) continue;
      MOE_TRY(f.wait_rail(b.rail.back + 8 * (n * channels + channel),
                          a.book->back[n * channels + channel] + (slot - first_slot(n)) + 1, Phase::sum, geo.rail_rank(n)));
      if (b.check) {
        const uint64_t at = remote_index(n, own) * b.shape.max_tokens;
        const char* row = f.rail(b.rail.area_b) + at * b.shape.slot_bytes() + slot * row_bytes;
        const uint64_t want = reinterpret_cast<const uint64_t*>(f.rail(b.rail.sums))[at + slot];
        const uint64_t got = row_checksum(row, row_bytes, checksum_seed(a.book->combines, geo.rail_rank(n), slot));
        if (want != got) return verify::wrong_row(Phase::sum, geo.rail_rank(n), t, want, got);
      }
    }
    return Status{};
  };

  Terms next = terms_of(begin);
  g.sync();
  for (int t = begin; t < end; ++t) {
    if (nodes > 1) MOE_TRY(leader(g, [&] { return wait_token(t); }));
    const Terms now = next;
    next = terms_of(t + 1);
    if (const int slot = a.plan.slot[int64_t{t} * nodes + own]; b.check && slot >= 0)
      MOE_TRY(verify::published_rows(g, f, a, own, slot, Phase::sum));
    const float* bias = a.bias ? a.bias + t * a.bias_stride : nullptr;
    f.reduce_rows(g, a.y + t * b.shape.combine_row_bytes(), now, &next, bias, b.shape.hidden, b.shape.dtype);
    if (a.slots && g.lane() == 0) collect_slots(t);
    g.sync();
    const int slot = a.plan.slot[int64_t{t} * nodes + own];
    if (slot >= 0 && g.lane() == 0) {
      count.rail.logical_rows += 1;
      count.rail.logical_bytes += row_bytes;
    }
  }
  g.sync();
  if (g.lane() == 0)
    for (int n = 0; n < nodes; ++n)
      if (n != own) a.book->back[n * channels + channel] += a.plan.blocks[n * b.count.ints + b.count.channels + channel];
  return {};
}

// Rows may be overwritten, and the block released, only after every gateway of the node has read them.
template <Group G, class F>
MOE_HD Status finish(G g, F f, const CombineArgs& a) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  g.sync();
  return leader(g, [&] {
    for (int d = 0; d < geo.ranks_per_node; ++d) f.signal_node(d, b.node.done + 8 * geo.local(), 1);
    for (int d = 0; d < geo.ranks_per_node; ++d)
      MOE_TRY(f.wait_node(b.node.done + 8 * d, a.book->combines, Phase::done, geo.rank_at(geo.node(), d)));
    return Status{};
  });
}

}  // namespace moecomm
