// The rail hop of dispatch.
//
//   send   (source)   rows into the rail peers' staging, a signal per chunk                    [per channel]
//   judge  (all)      does everything fit? the verdict follows the rows over the rail
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/quantize.hpp"
#include "protocol/verify.hpp"

namespace moecomm {

namespace detail {

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
template <Group G, Fabric<G> F>
MOE_HD void send(G g, F f, const DispatchArgs& a, int channel) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  const int own = geo.node(), nodes = geo.nodes();
  const uint64_t stride = wire_stride(a.plan.call), meta_size = meta_bytes(b.shape.top_k);
  const int begin = channel_begin(a.plan.tokens, channel, b.shape.channels);
  const int end = channel_begin(a.plan.tokens, channel + 1, b.shape.channels);
  const bool coding = quantizes(a);
  const bool dense =
      F::kPutsFromAnywhere && !coding && a.scales == nullptr && stride == a.plan.call.row_bytes;
  Counters& count = f.counters();

  for (int step = 1; step < nodes; ++step) {
    const int n = (own + step) % nodes;
    const uint64_t there = remote_index(own, n) * b.shape.max_tokens,
                   here = remote_index(n, own) * b.shape.max_tokens;
    char* staged = f.rail(b.rail.area_b) + here * b.shape.slot_bytes();
    char* metas = f.rail(b.rail.metas_out) + here * meta_size;
    int run_token = 0, run_slot = 0, run = 0;  // rows that go in one put
    int chunk_slot = 0, chunk = 0;             // rows that go under one signal
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
        if (a.scales)
          f.copy_row(g, row + align16(a.plan.call.row_bytes), a.scales + t * a.plan.call.scale_bytes,
                     a.plan.call.scale_bytes);
      }
      detail::write_meta(g, a, reinterpret_cast<RowMeta*>(metas + slot * meta_size),
                         verify::source_checksum(a, coding ? row : nullptr, t), t, n);
      if (run > 0 && dense && t != run_token + run) put_run();
      if (run++ == 0) {
        run_token = t;
        run_slot = slot;
      }
      if (chunk++ == 0) chunk_slot = slot;
      if (chunk == b.shape.chunk_rows) close_chunk();
    }
    close_chunk();
  }
  // The own node skips the hop: its gateway is this rank, and it reads the rows where they are.
  for (int t = begin; t < end; ++t) {
    const int slot = a.plan.slot[int64_t{t} * nodes + own];
    if (slot < 0) continue;
    RowMeta* meta = reinterpret_cast<RowMeta*>(f.rail(b.rail.metas) +
                                               (uint64_t(own) * b.shape.max_tokens + slot) * meta_size);
    detail::write_meta(g, a, meta, coding ? 0 : verify::source_checksum(a, nullptr, t), t, own);
    if (g.lane() == 0) {
      count.rail.logical_rows += 1;
      count.rail.logical_bytes += stride;
    }
  }
  g.sync();
}

// The node's verdict goes behind the rows, so every rank of the world learns it in this same call.
template <Group G, Fabric<G> F>
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

}  // namespace moecomm
