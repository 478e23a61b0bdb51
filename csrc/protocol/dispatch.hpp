// Dispatch: the roles in the order in which one rank runs them. docs/protocol.md tells one token's way.
//
//   announce  (source)   count blocks to the rail peers: "I am in the call, this is what I will send"
//   relay     (gateway)  pass each source's count block to every rank of the node, with my arena offer
//   place     (all)      prefix sums: the final row of everything that my rail's sources send to my node
//   send      (source)   rows into the rail peers' staging, a signal per chunk           [per channel]
//   judge     (all)      does everything fit? the verdict follows the rows over the rail
//   forward   (gateway)  each row to its final place in the windows of the ranks that want it [per channel]
//   arrive    (receiver) wait for all gateways, copy rows that several own experts want, zero the padding
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/quantize.hpp"
#include "protocol/verify.hpp"

namespace moecomm {

// Rows per rail signal: a chunk is large enough to amortise a signal, small enough to pipeline the hops.
constexpr int kChunkRows = 16;

template <Group G, class F>
MOE_HD void announce(G g, F f, const DispatchArgs& a) {
  const BufferView& b = a.b;
  const int own = b.geometry.node();
  const uint64_t bytes = uint64_t{4} * b.count.ints;
  if (g.lane() == 0) {
    for (int n = 0; n < b.geometry.nodes(); ++n) {
      int32_t* block = a.plan.blocks + n * b.count.ints;
      block[b.count.signature] = a.plan.call.signature();
      block[b.count.cached] = a.cached;
    }
    for (int step = 1; step < b.geometry.nodes(); ++step) {
      const int n = (own + step) % b.geometry.nodes();
      f.put(n, b.rail.blocks + own * bytes, reinterpret_cast<const char*>(a.plan.blocks) + n * bytes, bytes);
      f.signal_rail(n, b.rail.enter + 8 * own, 1);
    }
    ++a.book->enter;
    ++a.book->dispatches;
  }
  g.sync();
}

template <Group G, class F>
MOE_HD Status relay(G g, F f, const DispatchArgs& a, Offer offer) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), nodes = b.geometry.nodes(), p = b.geometry.ranks_per_node;
  const uint64_t bytes = uint64_t{4} * b.count.ints;
  for (int step = 0; step < nodes; ++step) {
    const int n = (own + step) % nodes, source = b.geometry.rail_rank(n);
    if (n != own)
      MOE_TRY(leader(g, [&] { return f.wait_rail(b.rail.enter + 8 * n, a.book->enter, Phase::announce, source); }));
    const FourInts* block = reinterpret_cast<const FourInts*>(
        n == own ? reinterpret_cast<const char*>(a.plan.blocks + n * b.count.ints) : f.rail(b.rail.blocks + n * bytes));
    for (int local = 0; local < p; ++local) {
      FourInts* table = reinterpret_cast<FourInts*>(f.window(local, b.node.tables + source * bytes));
      for (int i = g.lane(); i < b.count.ints / 4; i += g.size()) table[i] = block[i];
    }
  }
  if (g.lane() == 0)
    for (int local = 0; local < p; ++local)
      reinterpret_cast<Offer*>(f.window(local, b.node.offers))[b.geometry.local()] = offer;
  g.sync();
  if (g.lane() == 0)
    for (int local = 0; local < p; ++local) f.signal_node(local, b.node.counts + 8 * b.geometry.local(), 1);
  return {};
}

namespace detail {

MOE_HD inline const int32_t* table_of(const BufferView& b, const char* window, int source) {
  return reinterpret_cast<const int32_t*>(window + b.node.tables) + int64_t{source} * b.count.ints;
}

// Prefix sums over sources and experts: where the rows of every source of my rail begin, in every rank of
// the node. Lanes own experts (or ranks) of the node, then ranks, then experts again; ends with a sync.
template <Group G>
MOE_HD void place_rows(G g, const DispatchArgs& a, const char* window) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const bool by_rank = a.plan.call.layout == RowLayout::rank;
  const int p = geo.ranks_per_node, per_rank = b.experts_per_rank(), per_node = b.experts_per_node();
  const int own_first = geo.local() * per_rank;
  const int64_t alignment = a.plan.call.alignment;
  const auto total = [&](int field) {
    int32_t rows = 0;
    for (int s = 0; s < geo.size; ++s) rows += table_of(b, window, s)[field];
    return rows;
  };
  // The first row of `field` is known; those of the sources follow in ascending order.
  const auto follow = [&](int field, int index, int stride, int32_t row) {
    for (int s = 0; s < geo.size; ++s) {
      if (s % p == geo.local()) a.base[s / p * stride + index] = row;
      row += table_of(b, window, s)[field];
    }
    return row;
  };
  for (int e = g.lane(); e < per_node; e += g.size()) a.first[e] = total(b.count.experts + e);
  g.sync();
  for (int d = g.lane(); d < p; d += g.size()) {
    int64_t row = 0;
    for (int e = d * per_rank; e < (d + 1) * per_rank; ++e) {
      const int64_t rows = a.first[e], padded = (rows + alignment - 1) / alignment * alignment;
      if (d == geo.local()) {
        a.plan.tokens_per_expert[e - own_first] = rows;
        a.plan.rows_per_expert[e - own_first] = padded;
      }
      a.first[e] = static_cast<int32_t>(row);
      row += padded;
    }
    a.plan.rank_rows[d] = by_rank ? follow(b.count.ranks + d, d, p, 0) : row;
  }
  g.sync();
  if (!by_rank)
    for (int e = g.lane(); e < per_node; e += g.size()) follow(b.count.experts + e, e, per_node, a.first[e]);
}

}  // namespace detail

template <Group G, class F>
MOE_HD Status place(G g, F f, const DispatchArgs& a) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const int p = geo.ranks_per_node, nodes = geo.nodes(), channels = b.shape.channels;
  MOE_TRY(leader(g, [&] {
    for (int i = 0; i < p; ++i)
      MOE_TRY(f.wait_node(b.node.counts + 8 * i, a.book->dispatches, Phase::counts, geo.rank_at(geo.node(), i)));
    return Status{};
  }));
  const char* window = f.window(geo.local(), 0);

  Verdict verdict{};
  for (int s = 0; s < geo.size; ++s) {
    const int32_t* table = detail::table_of(b, window, s);
    if (verdict.code == 0 && (table[b.count.signature] != a.plan.call.signature() || table[b.count.cached] != a.cached))
      verdict = {static_cast<int32_t>(Code::mismatch), s, 0, 0, 0};
    if (b.check && g.lane() == 0) verify::keep_announced(a, table, s);
  }
  if (!a.cached && verdict.code == 0) detail::place_rows(g, a, window);
  // What will come over the rail is known even where the call is refused: it is taken off the wire then.
  for (int n = g.lane(); n < nodes; n += g.size()) {
    const int32_t* rows = detail::table_of(b, window, geo.rail_rank(n)) + b.count.channels;
    int32_t* first = a.plan.channel_first + n * (channels + 1);
    first[0] = 0;
    for (int c = 0; c < channels; ++c) first[c + 1] = first[c] + rows[c];
    a.plan.rows[n] = first[channels];
  }
  const Offer* offers = reinterpret_cast<const Offer*>(window + b.node.offers);
  for (int d = g.lane(); d < p; d += g.size()) a.offers[d] = offers[d];
  g.sync();
  if (g.lane() == 0) {
    for (int d = 0; d < p; ++d) {
      const CallShape& call = a.plan.call;
      const int64_t rows = call.capacity >= 0 ? call.capacity : a.plan.rank_rows[d];
      const BlockLayout block = block_layout(rows, call, b.shape.top_k);
      a.needed[d] = block.bytes + output_layout(rows, b.shape).bytes;
      const int piece = a.needed[d] <= a.offers[d].bytes[0] ? 0 : 1;
      a.target[d] = at_offset(block, a.offers[d].offset[piece]);
      if (verdict.code != 0) continue;
      const int32_t code = static_cast<int32_t>(Code::capacity), rank = geo.rank_at(geo.node(), d);
      if (a.plan.rank_rows[d] > rows)
        verdict = {code, rank, static_cast<uint64_t>(a.plan.rank_rows[d]), static_cast<uint64_t>(rows), 1};
      else if (a.needed[d] > a.offers[d].bytes[piece])
        verdict = {code, rank, a.needed[d], a.offers[d].bytes[piece], 0};
    }
    *a.verdict = verdict;
  }
  g.sync();
  return {};
}

namespace detail {

// Of token t's row, where checks are on: as it was staged, or as the caller gave it.
MOE_HD inline uint64_t checksum_of(const DispatchArgs& a, const char* staged, int t) {
  if (!a.b.check) return 0;
  const CallShape& call = a.plan.call;
  const uint64_t seed = checksum_seed(a.book->dispatches, a.b.geometry.rank, t);
  return staged ? verify::wire_checksum(call, staged, seed)
                : verify::wire_checksum(call, a.x + t * call.row_bytes, a.scales + t * call.scale_bytes, 1, seed);
}

// All lanes: the picks of token t that a node gets. Picks are sorted, so a node's are neighbours.
template <Group G>
MOE_HD void write_meta(G g, const DispatchArgs& a, RowMeta* meta, uint64_t checksum, int t, int node) {
  const BufferView& b = a.b;
  const int per_node = b.experts_per_node(), first_expert = node * per_node;
  const Pick* pick = a.plan.pick + int64_t{t} * b.shape.top_k;
  int begin = 0, end = a.plan.picks[t];
  while (begin < end && pick[begin].expert < first_expert) ++begin;
  while (end > begin && pick[end - 1].expert >= first_expert + per_node) --end;
  for (int i = begin + g.lane(); i < end; i += g.size()) {
    Pick out = pick[i];
    out.expert = static_cast<uint16_t>(out.expert - first_expert);
    out.weight = a.weights ? a.weights[int64_t{t} * b.shape.top_k + out.k] : 1.0f;
    meta->pick()[i - begin] = out;
  }
  if (g.lane() != 0) return;
  meta->token = t;
  meta->picks = end - begin;
  meta->checksum = checksum;
}

}  // namespace detail

// One channel's rows to every node. The enter signal of the rail peer (seen in relay) says that its
// staging is free again, so the rows may leave at once.
template <Group G, class F>
MOE_HD void send(G g, F f, const DispatchArgs& a, int channel) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const int own = geo.node(), nodes = geo.nodes();
  const uint64_t stride = wire_stride(a.plan.call), meta_size = meta_bytes(b.shape.top_k);
  const int begin = channel_begin(a.plan.tokens, channel, b.shape.channels);
  const int end = channel_begin(a.plan.tokens, channel + 1, b.shape.channels);
  const bool coding = quantizes(a);
  const bool dense = F::kPutsFromAnywhere && !coding && a.scales == nullptr && stride == a.plan.call.row_bytes;
  Counters& count = f.counters();

  for (int step = 1; step < nodes; ++step) {
    const int n = (own + step) % nodes;
    const uint64_t there = remote_index(own, n) * b.shape.max_tokens, here = remote_index(n, own) * b.shape.max_tokens;
    char* staged = f.rail(b.rail.area_b) + here * b.shape.slot_bytes();
    char* metas = f.rail(b.rail.metas_out) + here * meta_size;
    int run_token = 0, run_slot = 0, run = 0;      // rows that go in one put
    int chunk_slot = 0, chunk = 0;                 // rows that go under one signal
    const auto put_run = [&] {
      if (run == 0) return;
      const char* from = dense ? a.x + run_token * stride : staged + run_slot * stride;
      if (g.lane() == 0)
        f.put(n, b.rail.area_a + there * b.shape.slot_bytes() + run_slot * stride, from, run * stride);
      run = 0;
    };
    const auto close_chunk = [&] {
      g.sync();
      put_run();
      if (chunk > 0 && g.lane() == 0) {
        f.put(n, b.rail.metas + (uint64_t(own) * b.shape.max_tokens + chunk_slot) * meta_size,
              metas + chunk_slot * meta_size, chunk * meta_size);
        f.signal_rail(n, b.rail.rows + 8 * (own * b.shape.channels + channel), chunk);
        count.rail.logical_rows += chunk;
        count.rail.physical_rows += chunk;
        count.rail.logical_bytes += chunk * stride;
        count.rail.physical_bytes += chunk * stride;
      }
      chunk = 0;
    };
    for (int t = begin; t < end; ++t) {
      const int slot = a.plan.slot[int64_t{t} * nodes + n];
      if (slot < 0) continue;
      char* row = staged + slot * stride;
      const char* x = a.x + t * a.plan.call.row_bytes;
      if (coding) {
        detail::stage_quantized(g, f, a, t, step, row);
      } else if (!dense) {
        f.copy_row(g, row, x, a.plan.call.row_bytes);
        if (a.scales) f.copy_row(g, row + align16(a.plan.call.row_bytes), a.scales + t * a.plan.call.scale_bytes, a.plan.call.scale_bytes);
      }
      detail::write_meta(g, a, reinterpret_cast<RowMeta*>(metas + slot * meta_size), detail::checksum_of(a, coding ? row : nullptr, t), t, n);
      if (run > 0 && dense && t != run_token + run) put_run();
      if (run++ == 0) { run_token = t; run_slot = slot; }
      if (chunk++ == 0) chunk_slot = slot;
      if (chunk == kChunkRows) close_chunk();
    }
    close_chunk();
  }
  // The own node skips the hop: its gateway is this rank, and it reads the rows where they are.
  for (int t = begin; t < end; ++t) {
    const int slot = a.plan.slot[int64_t{t} * nodes + own];
    if (slot < 0) continue;
    RowMeta* meta = reinterpret_cast<RowMeta*>(f.rail(b.rail.metas) + (uint64_t(own) * b.shape.max_tokens + slot) * meta_size);
    detail::write_meta(g, a, meta, coding ? 0 : detail::checksum_of(a, nullptr, t), t, own);
    if (g.lane() == 0) {
      count.rail.logical_rows += 1;
      count.rail.logical_bytes += stride;
    }
  }
  g.sync();
}

// The node's verdict goes behind the rows, so every rank of the world learns it in this same call.
template <Group G, class F>
MOE_HD void judge(G g, F f, const DispatchArgs& a) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), nodes = b.geometry.nodes();
  if (g.lane() == 0 && nodes > 1) {
    Verdict* out = reinterpret_cast<Verdict*>(f.rail(b.rail.outbox));
    *out = *a.verdict;
    for (int step = 1; step < nodes; ++step) {
      const int n = (own + step) % nodes;
      f.put(n, b.rail.verdicts + own * sizeof(Verdict), reinterpret_cast<const char*>(out), sizeof(Verdict));
      f.signal_rail(n, b.rail.verdict + 8 * own, 1);
    }
  }
  g.sync();
}

namespace detail {

// Rank layout: no pick yet. The picks follow after a sync.
template <Group G>
MOE_HD void clear_picks(G g, char* window, const BlockLayout& l, int64_t row, int k_max) {
  for (int k = g.lane(); k < k_max; k += g.size()) {
    reinterpret_cast<int64_t*>(window + l.ids)[row * k_max + k] = -1;
    reinterpret_cast<float*>(window + l.weights)[row * k_max + k] = 0.0f;
  }
}

}  // namespace detail

// Rows of source node n's rail peer, one channel. Every row is read once and written once per rank, or
// once per pick where a further copy costs no link.
template <Group G, class F>
MOE_HD Status forward(G g, F f, const DispatchArgs& a, int n, int channel) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const CallShape& call = a.plan.call;
  const int own = geo.node(), channels = b.shape.channels, k_max = b.shape.top_k;
  const int per_rank = b.experts_per_rank(), per_node = b.experts_per_node(), p = geo.ranks_per_node;
  const int source = geo.rail_rank(n);
  const uint64_t stride = wire_stride(call), meta_size = meta_bytes(k_max);
  const int begin = a.plan.channel_first[n * (channels + 1) + channel];
  const int end = a.plan.channel_first[n * (channels + 1) + channel + 1];
  const char* metas = f.rail(b.rail.metas) + uint64_t(n) * b.shape.max_tokens * meta_size;
  const char* area = n == own ? nullptr : f.rail(b.rail.area_a) + remote_index(n, own) * b.shape.max_tokens * b.shape.slot_bytes();
  uint64_t& seen = a.book->rows[n * channels + channel];   // lane 0's alone
  const bool by_rank = call.layout == RowLayout::rank, judged_ok = a.verdict->code == 0, coding = n == own && quantizes(a);
  Counters& count = f.counters();
  uint64_t node_rows = 0, left_rows = 0;
  char** targets = f.targets();
  const auto rows_of = [&](int d) { return call.capacity >= 0 ? call.capacity : a.plan.rank_rows[d]; };

  for (int chunk = begin; chunk < end; chunk += kChunkRows) {
    const int chunk_end = chunk + kChunkRows < end ? chunk + kChunkRows : end;
    if (n != own)
      MOE_TRY(leader(g, [&] {
        return f.wait_rail(b.rail.rows + 8 * (n * channels + channel), seen + (chunk_end - begin), Phase::forward, source);
      }));
    if (!judged_ok) continue;   // the rows are taken off the wire, and dropped: no place was given to them
    if (b.check && n != own) MOE_TRY(verify::rail_rows(g, a, metas, area, stride, chunk, chunk_end, source));
    for (int i = chunk; i < chunk_end; ++i) {
      const RowMeta* meta = reinterpret_cast<const RowMeta*>(metas + i * meta_size);
      const char* row = coding     ? detail::own_quantized(g, f, a, meta->token, channel)
                        : n == own ? a.x + meta->token * call.row_bytes
                                   : area + i * stride;
      const char* scales = n != own || coding ? row + align16(call.row_bytes) : a.scales ? a.scales + meta->token * call.scale_bytes : nullptr;
      const int picks = meta->picks;
      Place* place = a.plan.place + (int64_t{n} * b.shape.max_tokens + i) * k_max;
      if (g.lane() == 0) {
        a.plan.row_picks[int64_t{n} * b.shape.max_tokens + i] = static_cast<uint8_t>(picks);
        if (b.check) a.plan.row_token[int64_t{n} * b.shape.max_tokens + i] = meta->token;
      }
      if (!a.cached)
        for (int j = g.lane(); j < picks; j += g.size()) {
          const Pick pick = meta->pick()[j];
          const int d = pick.expert / per_rank;
          place[j] = {static_cast<int16_t>(d), pick.k, pick.ordinal + (by_rank ? a.base[n * p + d] : a.base[n * per_node + pick.expert])};
        }
      g.sync();
      int copies = 0;
      for (int j = 0; j < picks; ++j) {
        const Place to = place[j];
        if (j == 0 || place[j - 1].local != to.local) {
          ++node_rows;
          left_rows += to.local != geo.local();
          if (by_rank) detail::clear_picks(g, f.window(to.local, 0), a.target[to.local], to.row, k_max);
        } else {
          if (by_rank || !f.replicates(to.local)) continue;   // arrive copies it there
        }
        char* window = f.window(to.local, 0);
        if (copies % g.size() == g.lane()) targets[copies] = window + a.target[to.local].rows + to.row * call.row_bytes;
        detail::put_scales(g, f, call, window + a.target[to.local].scales, rows_of(to.local), to.row, scales);
        ++copies;
      }
      g.sync();
      const uint64_t checksum = coding ? detail::checksum_of(a, row, meta->token) : meta->checksum;
      f.spread_row(g, targets, copies, row, call.row_bytes);
      for (int j = g.lane(); j < picks; j += g.size()) {
        const Pick pick = meta->pick()[j];
        const int d = place[j].local, r = place[j].row;
        int first = j;
        while (first > 0 && place[first - 1].local == d) --first;
        const BlockLayout& target = a.target[d];
        char* window = f.window(d, 0);
        float* weights = reinterpret_cast<float*>(window + target.weights);
        if (by_rank) {
          reinterpret_cast<int64_t*>(window + target.ids)[int64_t{r} * k_max + pick.k] = pick.expert - d * per_rank;
          weights[int64_t{r} * k_max + pick.k] = pick.weight;
          if (first != j) continue;   // one lane writes what the picks share
        } else {
          weights[r] = pick.weight;
          reinterpret_cast<int32_t*>(window + target.origin)[r] = f.replicates(d) ? -1 - place[first].row : place[first].row;
        }
        reinterpret_cast<int64_t*>(window + target.source)[r] = int64_t{source} << 32 | meta->token;
        if (b.check) reinterpret_cast<uint64_t*>(window + target.sums)[r] = checksum;
      }
      g.sync();   // `targets` may be overwritten
    }
  }
  if (g.lane() == 0) {
    if (n != own) seen += end - begin;
    count.node.logical_rows += node_rows;
    count.node.physical_rows += left_rows;
    count.node.logical_bytes += node_rows * (call.row_bytes + call.scale_bytes);
    count.node.physical_bytes += left_rows * (call.row_bytes + call.scale_bytes);
  }
  g.sync();
  return {};
}

// After a gateway's last channel: what it knows of the whole world's verdict, then "all forwarded".
template <Group G, class F>
MOE_HD Status announce_arrival(G g, F f, const DispatchArgs& a) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  return leader(g, [&] {
    Verdict all = *a.verdict;
    for (int n = 0; n < geo.nodes(); ++n) {
      if (n == geo.node()) continue;
      MOE_TRY(f.wait_rail(b.rail.verdict + 8 * n, a.book->dispatches, Phase::forward, geo.rail_rank(n)));
      const Verdict& theirs = reinterpret_cast<const Verdict*>(f.rail(b.rail.verdicts))[n];
      if (all.code == 0) all = theirs;
    }
    for (int d = 0; d < geo.ranks_per_node; ++d) {
      reinterpret_cast<Verdict*>(f.window(d, b.node.verdicts))[geo.local()] = all;
      f.signal_node(d, b.node.arrive + 8 * geo.local(), 1);
    }
    return Status{};
  });
}

// Part `part` of `parts`: the receiver's own work is shared out by rows.
template <Group G, class F>
MOE_HD Status arrive(G g, F f, const DispatchArgs& a, int part, int parts) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const CallShape& call = a.plan.call;
  MOE_TRY(leader(g, [&] {
    for (int i = 0; i < geo.ranks_per_node; ++i) {
      MOE_TRY(f.wait_node(b.node.arrive + 8 * i, a.book->dispatches, Phase::arrive, geo.rank_at(geo.node(), i)));
      const Verdict& v = reinterpret_cast<const Verdict*>(f.window(geo.local(), b.node.verdicts))[i];
      if (v.code != 0)
        return Status{static_cast<Code>(v.code), Phase::counts, v.rank, static_cast<int32_t>(v.unused), v.needed, v.available};
    }
    return Status{};
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
    f.copy_row(g, window + l.rows + to * call.row_bytes, window + l.rows + from * call.row_bytes, call.row_bytes);
    detail::copy_scales(g, f, call, window + l.scales, rows, to, from);
  };
  // Stretches of rows are dealt out in turn, one stretch after another, so that many short ones are shared too.
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
