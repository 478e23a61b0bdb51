// The node hop of dispatch.
//
//   forward           (gateway)  each row to its final place in the windows of the ranks that want it  [per
//   channel] announce_arrival  (gateway)  "I have forwarded everything", with the world's verdict
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/quantize.hpp"
#include "protocol/verify.hpp"

namespace moecomm {

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
template <Group G, Fabric<G> F>
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
  const char* area =
      n == own ? nullptr
               : f.rail(b.rail.area_a) + remote_index(n, own) * b.shape.max_tokens * b.shape.slot_bytes();
  uint64_t& seen = a.book->rows[n * channels + channel];  // lane 0's alone
  const bool by_rank = call.layout == RowLayout::rank, judged_ok = a.verdict->code == 0,
             coding = n == own && quantizes(a);
  Counters& count = f.counters();
  uint64_t node_rows = 0, left_rows = 0;
  char** targets = f.targets();
  const auto rows_of = [&](int d) { return call.capacity >= 0 ? call.capacity : a.plan.rank_rows[d]; };

  for (int chunk = begin; chunk < end; chunk += b.shape.chunk_rows) {
    const int chunk_end = chunk + b.shape.chunk_rows < end ? chunk + b.shape.chunk_rows : end;
    if (n != own)
      MOE_TRY(leader(g, [&] {
        return f.wait_rail(b.rail.rows + 8 * (n * channels + channel), seen + (chunk_end - begin),
                           Phase::forward, source);
      }));
    if (!judged_ok) continue;  // the rows are taken off the wire, and dropped: no place was given to them
    if (b.check && n != own) MOE_TRY(verify::rail_rows(g, a, metas, area, stride, chunk, chunk_end, source));
    for (int i = chunk; i < chunk_end; ++i) {
      const RowMeta* meta = reinterpret_cast<const RowMeta*>(metas + i * meta_size);
      const char* row = coding     ? detail::own_quantized(g, f, a, meta->token, channel)
                        : n == own ? a.x + meta->token * call.row_bytes
                                   : area + i * stride;
      const char* scales = n != own || coding ? row + align16(call.row_bytes)
                           : a.scales         ? a.scales + meta->token * call.scale_bytes
                                              : nullptr;
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
          place[j] = {static_cast<int16_t>(d), pick.k,
                      pick.ordinal + (by_rank ? a.base[n * p + d] : a.base[n * per_node + pick.expert])};
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
          if (by_rank || !f.replicates(to.local)) continue;  // arrive copies it there
        }
        char* window = f.window(to.local, 0);
        if (copies % g.size() == g.lane())
          targets[copies] = window + a.target[to.local].rows + to.row * call.row_bytes;
        detail::put_scales(g, f, call, window + a.target[to.local].scales, rows_of(to.local), to.row, scales);
        ++copies;
      }
      g.sync();
      const uint64_t checksum = coding ? verify::source_checksum(a, row, meta->token) : meta->checksum;
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
          reinterpret_cast<int64_t*>(window + target.ids)[int64_t{r} * k_max + pick.k] =
              pick.expert - d * per_rank;
          weights[int64_t{r} * k_max + pick.k] = pick.weight;
          if (first != j) continue;  // one lane writes what the picks share
        } else {
          weights[r] = pick.weight;
          reinterpret_cast<int32_t*>(window + target.origin)[r] =
              f.replicates(d) ? -1 - place[first].row : place[first].row;
        }
        reinterpret_cast<int64_t*>(window + target.source)[r] = int64_t{source} << 32 | meta->token;
        if (b.check) reinterpret_cast<uint64_t*>(window + target.sums)[r] = checksum;
      }
      g.sync();  // `targets` may be overwritten
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
template <Group G, Fabric<G> F>
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

}  // namespace moecomm
