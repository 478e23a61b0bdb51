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
#include "base/checksum.hpp"
#include "fabric/fabric.hpp"
#include "protocol/quantize.hpp"

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
    const int32_t* block = n == own ? a.plan.blocks + n * b.count.ints
                                    : reinterpret_cast<const int32_t*>(f.rail(b.rail.blocks + n * bytes));
    for (int local = 0; local < p; ++local) {
      int32_t* table = reinterpret_cast<int32_t*>(f.window(local, b.node.tables + source * bytes));
      for (int i = g.lane(); i < b.count.ints; i += g.size()) table[i] = block[i];
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

// Prefix sums for one rank of the node: where the rows of every source of my rail begin.
MOE_HD inline void place_rank(const DispatchArgs& a, const char* window, int d) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const int p = geo.ranks_per_node, per_rank = b.experts_per_rank(), per_node = b.experts_per_node();
  int64_t row = 0;
  const int64_t alignment = a.plan.call.alignment;
  if (a.plan.call.layout == RowLayout::rank) {
    for (int s = 0; s < geo.size; ++s) {
      if (s % p == geo.local()) a.base[s / p * p + d] = static_cast<int32_t>(row);
      row += table_of(b, window, s)[b.count.ranks + d];
    }
  }
  int64_t expert_row = 0;
  for (int e = 0; e < per_rank; ++e) {
    const int64_t first = expert_row;
    const int in_node = d * per_rank + e;
    for (int s = 0; s < geo.size; ++s) {
      if (a.plan.call.layout == RowLayout::expert && s % p == geo.local())
        a.base[s / p * per_node + in_node] = static_cast<int32_t>(expert_row);
      expert_row += table_of(b, window, s)[b.count.experts + in_node];
    }
    if (d == geo.local()) a.plan.tokens_per_expert[e] = expert_row - first;
    expert_row = first + (expert_row - first + alignment - 1) / alignment * alignment;
    if (d == geo.local()) a.plan.rows_per_expert[e] = expert_row - first;
  }
  a.plan.rank_rows[d] = a.plan.call.layout == RowLayout::rank ? row : expert_row;
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
  }
  if (!a.cached && verdict.code == 0)
    for (int d = g.lane(); d < p; d += g.size()) detail::place_rank(a, window, d);
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
      a.needed[d] = block_layout(rows, call, b.shape.top_k).bytes + output_layout(rows, b.shape).bytes;
      const int piece = a.needed[d] <= a.offers[d].bytes[0] ? 0 : 1;
      a.block_offset[d] = a.offers[d].offset[piece];
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

template <Group G>
MOE_HD void write_meta(G g, const DispatchArgs& a, RowMeta* meta, const char* row, int t, int node) {
  if (g.lane() != 0) return;
  const BufferView& b = a.b;
  const int per_node = b.experts_per_node();
  const Pick* pick = a.plan.pick + int64_t{t} * b.shape.top_k;
  int n = 0;
  for (int i = 0; i < a.plan.picks[t]; ++i) {
    if (pick[i].expert / per_node != node) continue;
    Pick& out = meta->pick()[n++];
    out = pick[i];
    out.expert = static_cast<uint16_t>(pick[i].expert - node * per_node);
    out.weight = a.weights ? a.weights[int64_t{t} * b.shape.top_k + pick[i].k] : 1.0f;
  }
  meta->token = t;
  meta->picks = n;
  if (b.check && row) meta->checksum = row_checksum(row, a.plan.call.row_bytes, t);
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
      detail::write_meta(g, a, reinterpret_cast<RowMeta*>(metas + slot * meta_size), coding ? row : x, t, n);
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
    detail::write_meta(g, a, meta, coding ? nullptr : a.x + t * a.plan.call.row_bytes, t, own);
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

// Rows of source node n's rail peer, one channel. Every row is read once and written once per rank.
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

  for (int chunk = begin; chunk < end; chunk += kChunkRows) {
    const int chunk_end = chunk + kChunkRows < end ? chunk + kChunkRows : end;
    if (n != own)
      MOE_TRY(leader(g, [&] {
        return f.wait_rail(b.rail.rows + 8 * (n * channels + channel), seen + (chunk_end - begin), Phase::forward, source);
      }));
    if (!judged_ok) continue;   // the rows are taken off the wire, and dropped: no place was given to them
    for (int i = chunk; i < chunk_end; ++i) {
      const RowMeta* meta = reinterpret_cast<const RowMeta*>(metas + i * meta_size);
      const char* row = coding     ? detail::own_quantized(g, f, a, meta->token, channel)
                        : n == own ? a.x + meta->token * call.row_bytes
                                   : area + i * stride;
      const char* scales = n != own || coding ? row + align16(call.row_bytes) : a.scales ? a.scales + meta->token * call.scale_bytes : nullptr;
      Place* place = a.plan.place + (int64_t{n} * b.shape.max_tokens + i) * k_max;
      if (g.lane() == 0) {
        a.plan.row_picks[int64_t{n} * b.shape.max_tokens + i] = static_cast<uint8_t>(meta->picks);
        if (!a.cached)
          for (int j = 0; j < meta->picks; ++j) {
            const Pick& pick = meta->pick()[j];
            const int d = pick.expert / per_rank;
            place[j] = {static_cast<int16_t>(d), pick.k, pick.ordinal + (by_rank ? a.base[n * p + d] : a.base[n * per_node + pick.expert])};
          }
      }
      g.sync();
      const uint64_t checksum = b.check && coding && g.lane() == 0 ? row_checksum(row, call.row_bytes, meta->token) : meta->checksum;
      for (int j = 0; j < meta->picks;) {
        const int d = place[j].local, first = place[j].row;
        char* window = f.window(d, a.block_offset[d]);
        const int64_t rows = call.capacity >= 0 ? call.capacity : a.plan.rank_rows[d];
        const BlockLayout block = block_layout(rows, call, k_max);
        f.copy_row(g, window + block.rows + first * call.row_bytes, row, call.row_bytes);
        detail::put_scales(g, f, call, window + block.scales, rows, first, scales);
        int next = j;
        if (g.lane() == 0) {
          float* weights = reinterpret_cast<float*>(window + block.weights);
          if (by_rank) {
            int64_t* ids = reinterpret_cast<int64_t*>(window + block.ids) + int64_t{first} * k_max;
            for (int k = 0; k < k_max; ++k) { ids[k] = -1; weights[int64_t{first} * k_max + k] = 0.0f; }
          }
          for (; next < meta->picks && place[next].local == d; ++next) {
            const Pick& pick = meta->pick()[next];
            const int r = place[next].row;
            if (by_rank) {
              reinterpret_cast<int64_t*>(window + block.ids)[int64_t{r} * k_max + pick.k] = pick.expert - d * per_rank;
              weights[int64_t{r} * k_max + pick.k] = pick.weight;
            } else {
              weights[r] = pick.weight;
              reinterpret_cast<int32_t*>(window + block.origin)[r] = first;
            }
            reinterpret_cast<int64_t*>(window + block.source)[r] = int64_t{source} << 32 | meta->token;
            if (b.check) reinterpret_cast<uint64_t*>(window + block.sums)[r] = checksum;
          }
        } else {
          while (next < meta->picks && place[next].local == d) ++next;
        }
        j = next;
        ++node_rows;
        left_rows += d != geo.local();
      }
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

namespace detail {

// MOECOMM_CHECK=1: every row is what its source read. Lanes take rows in turn, after all copies are done.
template <Group G>
MOE_HD Status verify_rows(G g, const DispatchArgs& a, const char* block, const BlockLayout& l, int64_t rows) {
  const uint64_t bytes = a.plan.call.row_bytes;
  const int64_t* source = reinterpret_cast<const int64_t*>(block + l.source);
  const uint64_t* sums = reinterpret_cast<const uint64_t*>(block + l.sums);
  Status wrong;
  for (int64_t r = g.lane(); r < rows && wrong.ok(); r += g.size()) {
    if (source[r] < 0) continue;   // padding
    const int32_t token = static_cast<int32_t>(source[r] & 0xffffffff);
    const uint64_t got = row_checksum(block + l.rows + r * bytes, bytes, token);
    if (got != sums[r]) wrong = {Code::corrupt, Phase::arrive, static_cast<int32_t>(source[r] >> 32), token, sums[r], got};
  }
  return first_failure(g, wrong);
}

}  // namespace detail

template <Group G, class F>
MOE_HD Status arrive(G g, F f, const DispatchArgs& a) {
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

  char* block = f.window(geo.local(), a.block_offset[geo.local()]);
  const int64_t real = a.plan.rank_rows[geo.local()];
  const int64_t rows = call.capacity >= 0 ? call.capacity : real;
  const BlockLayout l = block_layout(rows, call, b.shape.top_k);
  const bool by_rank = call.layout == RowLayout::rank;
  const int32_t* origin = reinterpret_cast<const int32_t*>(block + l.origin);
  int64_t* source = reinterpret_cast<int64_t*>(block + l.source);
  float* weights = reinterpret_cast<float*>(block + l.weights);
  uint64_t replicated = 0;
  const auto copy = [&](int64_t to, int64_t from) {
    f.copy_row(g, block + l.rows + to * call.row_bytes, block + l.rows + from * call.row_bytes, call.row_bytes);
    detail::copy_scales(g, f, call, block + l.scales, rows, to, from);
  };
  const auto clear = [&](int64_t r) {
    f.zero_row(g, block + l.rows + r * call.row_bytes, call.row_bytes);
    detail::zero_scales(g, f, call, block + l.scales, rows, r);
    if (g.lane() != 0) return;
    source[r] = -1;
    if (!by_rank) weights[r] = 0.0f;
    else
      for (int k = 0; k < b.shape.top_k; ++k) {
        weights[r * b.shape.top_k + k] = 0.0f;
        reinterpret_cast<int64_t*>(block + l.ids)[r * b.shape.top_k + k] = -1;
      }
  };
  if (!by_rank) {
    int64_t row = 0;
    for (int e = 0; e < b.experts_per_rank(); ++e) {
      const int64_t end = row + a.plan.tokens_per_expert[e], padded = row + a.plan.rows_per_expert[e];
      for (; row < end; ++row)
        if (origin[row] != row) { copy(row, origin[row]); ++replicated; }
      for (; row < padded; ++row) clear(row);
    }
  }
  for (int64_t row = real; row < rows; ++row) clear(row);
  if (g.lane() == 0) f.counters().replicated_rows += replicated;
  g.sync();
  return b.check ? detail::verify_rows(g, a, block, l, rows) : Status{};
}

}  // namespace moecomm
