// Combine: sends the experts' rows back on the plan of the dispatch, and sums them.
//
//   publish  (owner)    Announces to the node that this rank's rows may be read. When all ranks of the node
//                       have done so, it sends to the rail peers: "I am in the call", the wire format for
//                       rows sent back to it, and the node's verdict. So a refusal by one rank is known to
//                       every rank in this same call.
//   reduce   (gateway)  Sums the node's rows of a token in FP32, in ascending rank (and expert) order, and
//                       sends one row per token back over the rail, in the format that its source wants.
//                       [per channel]
//   sum      (source)   Sums the rows of its own node, read in place, and the other nodes' rows from staging,
//                       in ascending node order; adds the bias; rounds once. [per channel]
//   finish   (all)      Waits until no rank reads this rank's rows.
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/dispatch.hpp"
#include "protocol/returned.hpp"
#include "protocol/verify.hpp"
#include "protocol/views.hpp"

namespace moecomm {

namespace detail {

// Where the CombineVerdict from a rail peer on `node` arrives. A peer that waits for nothing from this rank
// may be one combine ahead, so there are two places, chosen by parity.
MOE_HD inline Offset<CombineVerdict> combine_verdict_at(const CombineArgs& a, int node) {
  return a.b.rail.combine_verdicts + ((a.consumed->combines & 1) * a.b.geometry.nodes() + node);
}

MOE_HD inline int32_t combine_word(const CombineArgs& a) {
  return call_word(a.consumed->enter, Verb::combine);
}

MOE_HD inline Status out_of_step(Phase phase, int rank, int32_t own, int32_t theirs) {
  return {Code::out_of_step,
          phase,
          rank,
          verbs_detail(Verb::combine, Verb::unknown),
          static_cast<uint32_t>(own),
          static_cast<uint32_t>(theirs)};
}

// This rank's CombineVerdict, with its node's verdict: the first rank that refuses, else the first rank that
// wants other returned values than the node's first rank.
MOE_HD inline Status judge_boards(const CombineArgs& a, CombineVerdict& mine) {
  const Geometry& geo = a.b.geometry;
  mine = CombineVerdict(combine_word(a), a.wire, a.returns());
  for (int d = 0; d < geo.ranks_per_node; ++d) {
    const RowsBoard& board = a.boards[d];
    const int rank = geo.rank_at(geo.node(), d);
    if (board.word != mine.word) return out_of_step(Phase::publish, rank, mine.word, board.word);
    if (mine.code() == Code::refused) continue;
    if (board.refused != Why::none)
      mine.decide(Code::refused, rank, board.refused);
    else if (mine.ok() && board.returns != a.boards[0].returns)
      mine.decide(Code::mismatch, rank, Why::none);
  }
  return {};
}

template <LaneFabric F>
MOE_HD const CombineVerdict& own_combine_verdict(F f, const CombineArgs& a) {
  return *f.rail(a.b.rail.combine_verdict_out);
}

// One lane waits until node n's rail peer is in the call, and checks its CombineVerdict.
template <LaneFabric F>
MOE_HD Status await_verdict(F f, const CombineArgs& a, int n, Phase phase) {
  const int rank = a.b.geometry.rail_rank(n);
  MOE_TRY(f.wait_rail(a.b.rail.enter + n, a.consumed->enter, phase, rank));
  const CombineVerdict& theirs = *f.rail(combine_verdict_at(a, n));
  return theirs.word == combine_word(a) ? Status{} : out_of_step(phase, rank, combine_word(a), theirs.word);
}

// Whether this node and node n, whose CombineVerdict has arrived, send each other rows. Both nodes decide the
// same.
template <LaneFabric F>
MOE_HD bool trades(F f, const CombineArgs& a, int n) {
  const CombineVerdict &mine = own_combine_verdict(f, a), &theirs = *f.rail(combine_verdict_at(a, n));
  return mine.ok() && theirs.ok() && mine.returns() == theirs.returns();
}

// The verdict of all nodes, once all of them have arrived. Either every rank gets a failure, or none does.
template <LaneFabric F>
MOE_HD Status judge_combine_verdicts(F f, const CombineArgs& a) {
  const Geometry& geo = a.b.geometry;
  const CombineVerdict& mine = own_combine_verdict(f, a);
  Status found;
  for (int n = 0; n < geo.nodes() && found.code != Code::refused; ++n) {
    const CombineVerdict& w = n == geo.node() ? mine : *f.rail(combine_verdict_at(a, n));
    if (!w.ok() && (found.ok() || w.code() == Code::refused))
      found = {w.code(), Phase::publish, w.rank, number(w.why())};
    else if (w.ok() && mine.ok() && found.ok() && w.returns() != mine.returns())
      found = {Code::mismatch,
               Phase::publish,
               geo.rail_rank(n),
               0,
               static_cast<uint64_t>(mine.returns()),
               static_cast<uint64_t>(w.returns())};
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
    ++a.consumed->enter;
    ++a.consumed->combines;
  }
  g.sync();
  if (b.check && a.refused == Why::none) {
    verify::sign_rows(g, f, a);
    g.sync();
  }
  return leader(g, [&] {
    RowsBoard* board = f.window(geo.local(), b.node.board);
    *board = a.mine;
    board->returns = a.returns();
    board->word = detail::combine_word(a);
    board->refused = a.refused;
    for (int d = 0; d < geo.ranks_per_node; ++d) f.signal_node(d, b.node.ready + geo.local(), 1);
    for (int d = 0; d < geo.ranks_per_node; ++d) {
      MOE_TRY(
          f.wait_node(b.node.ready + d, a.consumed->combines, Phase::publish, geo.rank_at(geo.node(), d)));
      a.boards[d] = *f.window(d, b.node.board);
    }
    CombineVerdict* verdict = f.rail(b.rail.combine_verdict_out);
    MOE_TRY(detail::judge_boards(a, *verdict));
    for (int step = 1; step < nodes; ++step) {
      const int n = (own + step) % nodes;
      put(f, n, detail::combine_verdict_at(a, own), verdict);
      f.signal_rail(n, b.rail.enter + own, 1);
    }
    return Status{};
  });
}

namespace detail {

// Adds the rows that this node contributes to row i of source node n to `terms`, and counts them.
template <Group G, Fabric<G> F>
MOE_HD void add_node_terms(G g, F f, const CombineArgs& a, int n, int i, Terms& terms) {
  const int64_t at = a.b.row_index(n, i);
  const Place* place = a.plan.place + at * a.b.shape.top_k;
  const uint64_t row_bytes = a.b.shape.combine_row_bytes();
  const bool by_rank = a.plan.call.layout == RowLayout::rank;
  uint64_t all = 0, remote = 0;
  for (int j = 0; j < a.plan.row_picks[at]; ++j) {
    const Place p = place[j];
    if (by_rank && j > 0 && place[j - 1].local == p.local) continue;  // one row per rank
    const RowsBoard board = a.boards[p.local];
    const char* window = f.window(p.local);
    terms.add_weighted(g, board.rows.in(window) + p.row * row_bytes,
                       board.weights ? board.weights.in(window) + p.row : nullptr);
    ++all;
    remote += p.local != a.b.geometry.local();
  }
  terms.fetch_weights();
  terms.close_group();
  if (g.lane() != 0) return;
  Counters& count = f.counters();
  count.node.logical_rows += all;
  count.node.physical_rows += remote;
  count.node.logical_bytes += all * row_bytes;
  count.node.physical_bytes += remote * row_bytes;
}

// The rows of one channel that return to node `node`: its slots [begin, end).
struct Returning {
  int node, channel, begin, end;
  Wire wire;
  uint64_t row_bytes;
  uint64_t peer_first;  // index of slot 0 in the peer's area B
  Offset<char> target;  // of slot 0 in the peer's region
  bool direct;          // stores reach the peer, so sums are written directly into its staging area
  char* rows;           // slot 0 of the sums that this rank writes
  uint64_t* sums;       // their checksums
  float* returned;      // [top_k] returned values for each
};

template <LaneFabric F>
MOE_HD Returning returning_rows(F f, const CombineArgs& a, int node, int channel) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), channels = b.shape.channels;
  const uint64_t own_first = b.remote_row(node, own);
  Returning r;
  r.node = node;
  r.channel = channel;
  r.begin = a.plan.first_row(node, channel, channels);
  r.end = a.plan.first_row(node, channel + 1, channels);
  r.wire = f.rail(combine_verdict_at(a, node))->wire();
  r.row_bytes = b.shape.wire_bytes(r.wire);
  r.peer_first = b.remote_row(own, node);
  r.target = b.area_b(own, node);
  char* straight = reach(f, node, r.target);
  r.direct = straight != nullptr;
  r.rows = straight ? straight : f.rail(b.area_a(node, own));
  r.sums = f.rail(b.rail.sums_out) + own_first;
  r.returned = f.rail(b.rail.returned_out) + own_first * b.shape.top_k;
  return r;
}

// Writes the sum of `now` as row i, with its returned values and its checksum. The rows of `next` may be
// prefetched.
template <Group G, Fabric<G> F>
MOE_HD void reduce_row(G g, F f, const CombineArgs& a, const Returning& r, int i, const Terms& now,
                       const Terms& next) {
  const Shape& s = a.b.shape;
  const float* no_bias = nullptr;
  char* row = r.rows + i * r.row_bytes;
  if (r.wire == Wire::plain)
    f.reduce_rows(g, row, now, &next, no_bias, s.hidden, s.dtype);
  else
    f.reduce_encode(g, row, r.wire, now, &next, s.hidden, s.dtype);
  g.sync();  // then the list of `now` may be overwritten, and the list of `next` may be read
  if (g.lane() != 0) return;
  if (a.returned) {
    float* returned = r.returned + int64_t{i} * s.top_k;
    for (int k = 0; a.sums_back && k < s.top_k; ++k) returned[k] = 0.0f;
    gather_returned(f, a, r.node, i, returned);
  }
  if (a.b.check)
    r.sums[i] = row_checksum(row, r.row_bytes, checksum_seed(a.consumed->combines, a.b.geometry.rank, i));
}

// One lane puts `rows` rows from slot `first` on, and the signal.
template <LaneFabric F>
MOE_HD void return_chunk(F f, const CombineArgs& a, const Returning& r, int first, int rows) {
  const BufferView& b = a.b;
  const int k_max = b.shape.top_k;
  if (!r.direct)
    f.put(r.node, r.target + first * r.row_bytes, r.rows + first * r.row_bytes, rows * r.row_bytes);
  if (b.check) put(f, r.node, b.rail.sums + (r.peer_first + first), r.sums + first, rows);
  if (a.returned)
    put(f, r.node, b.rail.returned + k_max * (r.peer_first + first), r.returned + int64_t{first} * k_max,
        k_max * rows);
  f.signal_rail(r.node, b.back_counter(b.geometry.node(), r.channel), rows);
  HopCounters& hop = f.counters().rail;
  hop.logical_rows += rows;
  hop.physical_rows += rows;
  hop.logical_bytes += rows * r.row_bytes;
  hop.physical_bytes += rows * r.row_bytes;
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD Status reduce(G g, F f, const CombineArgs& a, int node, int channel) {
  const BufferView& b = a.b;
  MOE_TRY(leader(g, [&] { return detail::await_verdict(f, a, node, Phase::reduce); }));
  if (!detail::trades(f, a, node)) return {};
  const detail::Returning r = detail::returning_rows(f, a, node, channel);
  // The terms of the next row are listed before a row is summed, so that the fabric can prefetch them.
  const auto terms_of = [&](int i) {
    Terms terms{&f.terms(i & 1)};
    if (i < r.end) detail::add_node_terms(g, f, a, node, i, terms);
    return terms;
  };
  Terms next = terms_of(r.begin);
  g.sync();
  for (int chunk = r.begin; chunk < r.end; chunk += b.shape.chunk_rows) {
    const int chunk_end = chunk + b.shape.chunk_rows < r.end ? chunk + b.shape.chunk_rows : r.end;
    for (int i = chunk; i < chunk_end; ++i) {
      const Terms now = next;
      next = terms_of(i + 1);
      if (b.check) MOE_TRY(verify::published_rows(g, f, a, node, i, Phase::reduce));
      detail::reduce_row(g, f, a, r, i, now, next);
    }
    g.sync();
    if (g.lane() == 0) detail::return_chunk(f, a, r, chunk, chunk_end - chunk);
  }
  g.sync();
  return {};
}

namespace detail {

// For a refused call: consumes the rows of nodes that still send rows to this one.
template <Group G, Fabric<G> F>
MOE_HD Status drop_back(G g, F f, const CombineArgs& a, int channel) {
  const BufferView& b = a.b;
  const int own = b.geometry.node();
  return leader(g, [&] {
    for (int n = 0; n < b.geometry.nodes(); ++n) {
      if (n == own || !trades(f, a, n)) continue;
      uint64_t& back = a.consumed->back[b.channel_index(n, channel)];
      const uint64_t rows = a.plan.blocks[n * b.count.ints + b.count.channels + channel];
      MOE_TRY(f.wait_rail(b.back_counter(n, channel), back + rows, Phase::sum, b.geometry.rail_rank(n)));
      back += rows;
    }
    return Status{};
  });
}

// Slot `slot` of the rows that node n returns to this rank.
template <LaneFabric F>
MOE_HD const char* returned_row(F f, const CombineArgs& a, int n, int slot, uint64_t row_bytes) {
  return f.rail(a.b.area_b(n, a.b.geometry.node())) + slot * row_bytes;
}

// The terms of y[t]: this node's rows, and one row from every other node that has a pick of the token.
template <Group G, Fabric<G> F>
MOE_HD Terms token_terms(G g, F f, const CombineArgs& a, int t, uint64_t row_bytes) {
  const int own = a.b.geometry.node(), nodes = a.b.geometry.nodes();
  Terms terms{&f.terms(t & 1)};
  for (int n = 0; n < nodes; ++n) {
    const int slot = a.plan.slot_of(t, n, nodes);
    if (slot < 0) continue;
    if (n == own) {
      add_node_terms(g, f, a, n, slot, terms);
    } else {
      terms.add_wire(g, returned_row(f, a, n, slot, row_bytes), a.wire, a.b.shape.hidden);
      terms.close_group();
    }
  }
  return terms;
}

// One lane waits until the other nodes' rows for token t have arrived. With checks, it verifies them.
template <LaneFabric F>
MOE_HD Status await_token(F f, const CombineArgs& a, int channel, int t, uint64_t row_bytes) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), nodes = b.geometry.nodes();
  for (int n = 0; n < nodes; ++n) {
    const int slot = a.plan.slot_of(t, n, nodes);
    if (n == own || slot < 0) continue;
    const int rank = b.geometry.rail_rank(n);
    const uint64_t before = slot - a.plan.first_slot(n, channel, b.shape.channels);
    MOE_TRY(f.wait_rail(b.back_counter(n, channel),
                        a.consumed->back[b.channel_index(n, channel)] + before + 1, Phase::sum, rank));
    if (!b.check) continue;
    const uint64_t want = f.rail(b.rail.sums)[b.remote_row(n, own) + slot];
    const uint64_t got = row_checksum(returned_row(f, a, n, slot, row_bytes), row_bytes,
                                      checksum_seed(a.consumed->combines, rank, slot));
    if (want != got) return verify::wrong_row(Phase::sum, rank, t, want, got);
  }
  return {};
}

// One lane records that the other nodes' rows of the channel have been read.
MOE_HD inline void close_channel(const CombineArgs& a, int channel) {
  const BufferView& b = a.b;
  for (int n = 0; n < b.geometry.nodes(); ++n)
    if (n != b.geometry.node())
      a.consumed->back[b.channel_index(n, channel)] +=
          a.plan.blocks[n * b.count.ints + b.count.channels + channel];
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD Status sum(G g, F f, const CombineArgs& a, int channel) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), nodes = b.geometry.nodes();
  const uint64_t row_bytes = b.shape.wire_bytes(a.wire);
  MOE_TRY(leader(g, [&] {
    for (int n = 0; n < nodes; ++n)
      if (n != own) MOE_TRY(detail::await_verdict(f, a, n, Phase::sum));
    return Status{};
  }));
  if (!detail::judge_combine_verdicts(f, a).ok()) return detail::drop_back(g, f, a, channel);
  const int begin = channel_begin(a.plan.tokens, channel, b.shape.channels);
  const int end = channel_begin(a.plan.tokens, channel + 1, b.shape.channels);
  const auto terms_of = [&](int t) {
    return t < end ? detail::token_terms(g, f, a, t, row_bytes) : Terms{&f.terms(t & 1)};
  };
  Terms next = terms_of(begin);
  g.sync();
  for (int t = begin; t < end; ++t) {
    if (nodes > 1) MOE_TRY(leader(g, [&] { return detail::await_token(f, a, channel, t, row_bytes); }));
    const Terms now = next;
    next = terms_of(t + 1);
    const int slot = a.plan.slot_of(t, own, nodes);
    if (b.check && slot >= 0) MOE_TRY(verify::published_rows(g, f, a, own, slot, Phase::sum));
    const float* bias = a.bias ? a.bias + t * a.bias_stride : nullptr;
    f.reduce_rows(g, a.y + t * b.shape.combine_row_bytes(), now, &next, bias, b.shape.hidden, b.shape.dtype);
    if (a.returned && g.lane() == 0) detail::collect_returned(f, a, t);
    g.sync();
    if (slot >= 0 && g.lane() == 0) {
      f.counters().rail.logical_rows += 1;
      f.counters().rail.logical_bytes += row_bytes;
    }
  }
  g.sync();
  if (g.lane() == 0) detail::close_channel(a, channel);
  return {};
}

// Rows may be overwritten, and the block freed, only after every gateway of the node has read them.
template <Group G, Fabric<G> F>
MOE_HD Status finish(G g, F f, const CombineArgs& a) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  g.sync();
  return leader(g, [&] {
    for (int d = 0; d < geo.ranks_per_node; ++d) f.signal_node(d, b.node.done + geo.local(), 1);
    for (int d = 0; d < geo.ranks_per_node; ++d)
      MOE_TRY(f.wait_node(b.node.done + d, a.consumed->combines, Phase::done, geo.rank_at(geo.node(), d)));
    return detail::judge_combine_verdicts(f, a);
  });
}

}  // namespace moecomm
