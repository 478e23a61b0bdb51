// Combine: the way back on the same plan.
//
//   publish  (expert)   "my rows may be read", to the node; when all of it have said so, "I am in the call",
//   the wanted wire and
//                       the node's judgement over the rail: a refusal by one rank is every rank's in this
//                       same call
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

// Where a rail peer's Wish lies. A peer that waits for nothing here may be one combine ahead, hence the
// parity.
MOE_HD inline uint64_t wish_at(const CombineArgs& a, int node) {
  return a.b.rail.wishes + sizeof(Wish) * ((a.book->combines & 1) * a.b.geometry.nodes() + node);
}

MOE_HD inline int32_t combine_word(const CombineArgs& a) { return call_word(a.book->enter, Verb::combine); }

MOE_HD inline Status out_of_step(Phase phase, int rank, int32_t own, int32_t theirs) {
  return {Code::out_of_step,
          phase,
          rank,
          verbs_detail(Verb::combine, Verb::unknown),
          static_cast<uint32_t>(own),
          static_cast<uint32_t>(theirs)};
}

// What this rank wants, and its node's judgement: the first rank that refuses, else the first that wants
// slots where another does not.
MOE_HD inline Status judge_boards(const CombineArgs& a, Wish& mine) {
  const Geometry& geo = a.b.geometry;
  mine = {combine_word(a), 0, 0, 0, static_cast<uint8_t>(a.wire), static_cast<uint8_t>(a.slots != nullptr)};
  for (int d = 0; d < geo.ranks_per_node; ++d) {
    const RowsBoard& board = a.boards[d];
    const int rank = geo.rank_at(geo.node(), d);
    if (static_cast<int32_t>(board.word) != mine.word)
      return out_of_step(Phase::publish, rank, mine.word, static_cast<int32_t>(board.word));
    Code code = Code::ok;
    if (board.refused != 0)
      code = Code::refused;
    else if (board.slots != a.boards[0].slots)
      code = Code::mismatch;
    if (code == Code::ok || mine.code == static_cast<uint8_t>(Code::refused) ||
        mine.code == static_cast<uint8_t>(code))
      continue;
    mine.rank = static_cast<uint16_t>(rank);
    mine.code = static_cast<uint8_t>(code);
    mine.why = static_cast<uint8_t>(board.refused);
  }
  return {};
}

template <LaneFabric F>
MOE_HD const Wish& own_wish(F f, const CombineArgs& a) {
  return *reinterpret_cast<const Wish*>(f.rail(a.b.rail.wish_out));
}

// One lane: node n's Wish, when its rail peer is in the call.
template <LaneFabric F>
MOE_HD Status await_wish(F f, const CombineArgs& a, int n, Phase phase) {
  const int rank = a.b.geometry.rail_rank(n);
  MOE_TRY(f.wait_rail(a.b.rail.enter + 8 * n, a.book->enter, phase, rank));
  const Wish& theirs = *reinterpret_cast<const Wish*>(f.rail(wish_at(a, n)));
  return theirs.word == combine_word(a) ? Status{} : out_of_step(phase, rank, combine_word(a), theirs.word);
}

// Whether rows pass between this node and node n, whose Wish is here. Both sides see the same.
template <LaneFabric F>
MOE_HD bool trades(F f, const CombineArgs& a, int n) {
  const Wish &mine = own_wish(f, a), &theirs = *reinterpret_cast<const Wish*>(f.rail(wish_at(a, n)));
  return mine.code == 0 && theirs.code == 0 && mine.slots == theirs.slots;
}

// The world's judgement, when all Wishes are here: every rank finds something, or none does.
template <LaneFabric F>
MOE_HD Status judge_wishes(F f, const CombineArgs& a) {
  const Geometry& geo = a.b.geometry;
  const Wish& mine = own_wish(f, a);
  Status found;
  for (int n = 0; n < geo.nodes() && found.code != Code::refused; ++n) {
    const Wish& w = n == geo.node() ? mine : *reinterpret_cast<const Wish*>(f.rail(wish_at(a, n)));
    if (w.code != 0 && (found.ok() || w.code == static_cast<uint8_t>(Code::refused)))
      found = {static_cast<Code>(w.code), Phase::publish, w.rank, w.why};
    else if (w.code == 0 && mine.code == 0 && found.ok() && w.slots != mine.slots)
      found = {Code::mismatch, Phase::publish, geo.rail_rank(n), 0, mine.slots, w.slots};
  }
  return found;
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD Status publish(G g, F f, const CombineArgs& a) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const int own = geo.node(), nodes = geo.nodes();
  if (g.lane() == 0) {
    ++a.book->enter;
    ++a.book->combines;
  }
  g.sync();
  if (b.check && a.refused == Why::none) {
    verify::sign_rows(g, f, a);
    g.sync();
  }
  return leader(g, [&] {
    RowsBoard* board = reinterpret_cast<RowsBoard*>(f.window(geo.local(), b.node.board));
    *board = a.mine;
    board->slots = a.slots != nullptr;
    board->word = static_cast<uint32_t>(detail::combine_word(a));
    board->refused = static_cast<uint64_t>(a.refused);
    for (int d = 0; d < geo.ranks_per_node; ++d) f.signal_node(d, b.node.ready + 8 * geo.local(), 1);
    for (int d = 0; d < geo.ranks_per_node; ++d) {
      MOE_TRY(
          f.wait_node(b.node.ready + 8 * d, a.book->combines, Phase::publish, geo.rank_at(geo.node(), d)));
      a.boards[d] = *reinterpret_cast<const RowsBoard*>(f.window(d, b.node.board));
    }
    Wish* wish = reinterpret_cast<Wish*>(f.rail(b.rail.wish_out));
    MOE_TRY(detail::judge_boards(a, *wish));
    for (int step = 1; step < nodes; ++step) {
      const int n = (own + step) % nodes;
      f.put(n, detail::wish_at(a, own), reinterpret_cast<const char*>(wish), sizeof(Wish));
      f.signal_rail(n, b.rail.enter + 8 * own, 1);
    }
    return Status{};
  });
}

namespace detail {

// The rows that this node contributes to row i of source node n; counted as they are listed.
template <Group G, Fabric<G> F>
MOE_HD void add_node_terms(G g, F f, const CombineArgs& a, int n, int i, Terms& terms) {
  const int64_t at = int64_t{n} * a.b.shape.max_tokens + i;
  const Place* place = a.plan.place + at * a.b.shape.top_k;
  const uint64_t row_bytes = a.b.shape.combine_row_bytes();
  const bool by_rank = a.plan.call.layout == RowLayout::rank;
  uint64_t all = 0, remote = 0;
  for (int j = 0; j < a.plan.row_picks[at]; ++j) {
    const Place p = place[j];
    if (by_rank && j > 0 && place[j - 1].local == p.local) continue;  // one row per rank
    const RowsBoard board = a.boards[p.local];
    const char* window = f.window(p.local, 0);
    terms.add(g, window + board.rows + p.row * row_bytes, [&] {
      return board.weights ? reinterpret_cast<const float*>(window + board.weights)[p.row] : 1.0f;
    });
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
template <LaneFabric F>
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

template <Group G, Fabric<G> F>
MOE_HD Status reduce(G g, F f, const CombineArgs& a, int n, int channel) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const int own = geo.node(), channels = b.shape.channels;
  MOE_TRY(leader(g, [&] { return detail::await_wish(f, a, n, Phase::reduce); }));
  if (!detail::trades(f, a, n)) return {};
  const int begin = a.plan.channel_first[n * (channels + 1) + channel];
  const int end = a.plan.channel_first[n * (channels + 1) + channel + 1];
  const uint64_t here = remote_index(n, own) * b.shape.max_tokens,
                 there = remote_index(own, n) * b.shape.max_tokens;
  const uint64_t target = b.rail.area_b + there * b.shape.slot_bytes();
  char* straight =
      reach(f, n, target);  // where stores reach the peer, rows are summed right into its staging
  char* staged = straight ? straight : f.rail(b.rail.area_a) + here * b.shape.slot_bytes();
  uint64_t* sums = reinterpret_cast<uint64_t*>(f.rail(b.rail.sums_out)) + here;
  const int k_max = b.shape.top_k;
  float* slots = reinterpret_cast<float*>(f.rail(b.rail.slots_out)) + here * k_max;
  Counters& count = f.counters();
  const Wire wire = static_cast<Wire>(reinterpret_cast<const Wish*>(f.rail(detail::wish_at(a, n)))->wire);
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
      if (wire == Wire::plain)
        f.reduce_rows(g, row, now, &next, static_cast<const float*>(nullptr), b.shape.hidden, b.shape.dtype);
      else
        f.reduce_encode(g, row, wire, now, &next, b.shape.hidden, b.shape.dtype);
      g.sync();  // the list of `now` may be overwritten, that of `next` may be read
      if (a.slots && g.lane() == 0) detail::gather_slots(f, a, n, i, slots + int64_t{i} * k_max);
      if (b.check && g.lane() == 0)
        sums[i] = row_checksum(row, row_bytes, checksum_seed(a.book->combines, geo.rank, i));
    }
    g.sync();
    if (g.lane() == 0) {
      const int rows = chunk_end - chunk;
      if (!straight) f.put(n, target + chunk * row_bytes, staged + chunk * row_bytes, rows * row_bytes);
      if (b.check)
        f.put(n, b.rail.sums + 8 * (there + chunk), reinterpret_cast<const char*>(sums + chunk), 8 * rows);
      if (a.slots)
        f.put(n, b.rail.slots + 4 * k_max * (there + chunk),
              reinterpret_cast<const char*>(slots + int64_t{chunk} * k_max), 4 * k_max * rows);
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

namespace detail {

// A call that is refused: the rows of nodes that trade with this one are taken off the wire all the same.
template <Group G, Fabric<G> F>
MOE_HD Status drop_back(G g, F f, const CombineArgs& a, int channel) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), channels = b.shape.channels;
  return leader(g, [&] {
    for (int n = 0; n < b.geometry.nodes(); ++n) {
      if (n == own || !trades(f, a, n)) continue;
      uint64_t& back = a.book->back[n * channels + channel];
      const uint64_t rows = a.plan.blocks[n * b.count.ints + b.count.channels + channel];
      MOE_TRY(f.wait_rail(b.rail.back + 8 * (n * channels + channel), back + rows, Phase::sum,
                          b.geometry.rail_rank(n)));
      back += rows;
    }
    return Status{};
  });
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD Status sum(G g, F f, const CombineArgs& a, int channel) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const int own = geo.node(), nodes = geo.nodes(), channels = b.shape.channels;
  const uint64_t row_bytes = b.shape.wire_bytes(a.wire);
  MOE_TRY(leader(g, [&] {
    for (int n = 0; n < nodes; ++n)
      if (n != own) MOE_TRY(detail::await_wish(f, a, n, Phase::sum));
    return Status{};
  }));
  if (!detail::judge_wishes(f, a).ok()) return detail::drop_back(g, f, a, channel);
  const int begin = channel_begin(a.plan.tokens, channel, channels);
  const int end = channel_begin(a.plan.tokens, channel + 1, channels);
  Counters& count = f.counters();
  const auto first_slot = [&](int n) { return a.plan.send_first[n * (channels + 1) + channel]; };
  const auto terms_of = [&](int t) {
    Terms terms{&f.terms(t & 1)};
    for (int n = 0; t < end && n < nodes; ++n) {
      const int slot = a.plan.slot[int64_t{t} * nodes + n];
      if (slot < 0) continue;
      if (n == own)
        detail::add_node_terms(g, f, a, n, slot, terms);
      else {
        const char* row = f.rail(b.rail.area_b) +
                          remote_index(n, own) * b.shape.max_tokens * b.shape.slot_bytes() + slot * row_bytes;
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
                          a.book->back[n * channels + channel] + (slot - first_slot(n)) + 1, Phase::sum,
                          geo.rail_rank(n)));
      if (b.check) {
        const uint64_t at = remote_index(n, own) * b.shape.max_tokens;
        const char* row = f.rail(b.rail.area_b) + at * b.shape.slot_bytes() + slot * row_bytes;
        const uint64_t want = reinterpret_cast<const uint64_t*>(f.rail(b.rail.sums))[at + slot];
        const uint64_t got =
            row_checksum(row, row_bytes, checksum_seed(a.book->combines, geo.rail_rank(n), slot));
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
      if (n != own)
        a.book->back[n * channels + channel] += a.plan.blocks[n * b.count.ints + b.count.channels + channel];
  return {};
}

// Rows may be overwritten, and the block released, only after every gateway of the node has read them.
template <Group G, Fabric<G> F>
MOE_HD Status finish(G g, F f, const CombineArgs& a) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  g.sync();
  return leader(g, [&] {
    for (int d = 0; d < geo.ranks_per_node; ++d) f.signal_node(d, b.node.done + 8 * geo.local(), 1);
    for (int d = 0; d < geo.ranks_per_node; ++d)
      MOE_TRY(f.wait_node(b.node.done + 8 * d, a.book->combines, Phase::done, geo.rank_at(geo.node(), d)));
    return detail::judge_wishes(f, a);
  });
}

}  // namespace moecomm
