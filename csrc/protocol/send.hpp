// The rail hop of dispatch.
//
//   send   (source)   puts rows into the rail peers' staging areas, with a signal per chunk [per channel]
//   judge  (all)      sends the node's verdict over the rail, behind the rows
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/quantize.hpp"
#include "protocol/verify.hpp"

namespace moecomm {

namespace detail {

// All lanes write the picks of token t for one node. Picks are sorted, so those of a node are adjacent.
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

// The rows of one channel that are sent to node `node`. Adjacent rows are sent in one put (a run), and one
// signal announces chunk_rows of them (a chunk).
struct Outgoing {
  int node, channel, step;  // node = this node + step
  bool coding;              // this rank quantizes the rows to FP8
  bool dense;               // they are sent from the caller's memory
  uint64_t stride, meta_size;
  char* staged;    // slot 0 of the outgoing rows
  RowMeta* metas;  // and of their metadata
  int run_token = 0, run_slot = 0, run = 0;
  int chunk_slot = 0, chunk = 0;
};

template <LaneFabric F>
MOE_HD Outgoing outgoing_rows(F f, const DispatchArgs& a, int step, int channel) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), nodes = b.geometry.nodes();
  Outgoing out;
  out.node = (own + step) % nodes;
  out.channel = channel;
  out.step = step;
  out.coding = quantizes(a);
  out.stride = wire_stride(a.plan.call);
  out.meta_size = meta_bytes(b.shape.top_k);
  out.dense =
      F::kPutsFromAnywhere && !out.coding && a.scales == nullptr && out.stride == a.plan.call.row_bytes;
  out.staged = f.rail(b.area_b(out.node, own));
  out.metas = f.rail(b.rail.metas_out.moved(b.remote_row(out.node, own) * out.meta_size));
  return out;
}

// All lanes copy token t's row to `row` in the staging area, unless rows are sent from the caller's memory.
template <Group G, Fabric<G> F>
MOE_HD void stage_row(G g, F f, const DispatchArgs& a, const Outgoing& out, int t, char* row) {
  const CallShape& call = a.plan.call;
  if (out.coding) return stage_quantized(g, f, a, t, out.step, row);
  if (out.dense) return;
  f.copy_row(g, row, a.x + t * call.row_bytes, call.row_bytes);
  if (a.scales)
    f.copy_row(g, row + align16(call.row_bytes), a.scales + t * call.scale_bytes, call.scale_bytes);
}

// Lane 0 puts the run.
template <Group G, Fabric<G> F>
MOE_HD void put_run(G g, F f, const DispatchArgs& a, Outgoing& out) {
  if (out.run == 0) return;
  const char* from = out.dense ? a.x + out.run_token * out.stride : out.staged + out.run_slot * out.stride;
  if (g.lane() == 0)
    f.put(out.node, a.b.area_a(a.b.geometry.node(), out.node) + out.run_slot * out.stride, from,
          out.run * out.stride);
  out.run = 0;
}

// Lane 0 puts the rest of the chunk, its metadata, and the signal.
template <Group G, Fabric<G> F>
MOE_HD void close_chunk(G g, F f, const DispatchArgs& a, Outgoing& out) {
  g.sync();
  put_run(g, f, a, out);
  if (out.chunk > 0 && g.lane() == 0) {
    const int own = a.b.geometry.node();
    put_bytes(f, out.node, a.b.meta(own, out.chunk_slot), moved(out.metas, out.chunk_slot * out.meta_size),
              out.chunk * out.meta_size);
    f.signal_rail(out.node, a.b.rows_counter(own, out.channel), out.chunk);
    HopCounters& hop = f.counters().rail;
    hop.logical_rows += out.chunk;
    hop.physical_rows += out.chunk;
    hop.logical_bytes += out.chunk * out.stride;
    hop.physical_bytes += out.chunk * out.stride;
  }
  out.chunk = 0;
}

template <Group G, Fabric<G> F>
MOE_HD void send_to_node(G g, F f, const DispatchArgs& a, Outgoing out, int begin, int end) {
  const int nodes = a.b.geometry.nodes();
  for (int t = begin; t < end; ++t) {
    const int slot = a.plan.slot_of(t, out.node, nodes);
    if (slot < 0) continue;
    char* row = out.staged + slot * out.stride;
    stage_row(g, f, a, out, t, row);
    write_meta(g, a, moved(out.metas, slot * out.meta_size),
               verify::source_checksum(a, out.coding ? row : nullptr, t), t, out.node);
    if (out.run > 0 && out.dense && t != out.run_token + out.run) put_run(g, f, a, out);
    if (out.run++ == 0) {
      out.run_token = t;
      out.run_slot = slot;
    }
    if (out.chunk++ == 0) out.chunk_slot = slot;
    if (out.chunk == a.b.shape.chunk_rows) close_chunk(g, f, a, out);
  }
  close_chunk(g, f, a, out);
}

// Rows for this node skip the rail: this rank is their gateway and reads them from `x`.
template <Group G, Fabric<G> F>
MOE_HD void note_local_rows(G g, F f, const DispatchArgs& a, int begin, int end) {
  const int own = a.b.geometry.node(), nodes = a.b.geometry.nodes();
  const bool coding = quantizes(a);
  HopCounters& hop = f.counters().rail;
  for (int t = begin; t < end; ++t) {
    const int slot = a.plan.slot_of(t, own, nodes);
    if (slot < 0) continue;
    write_meta(g, a, f.rail(a.b.meta(own, slot)), coding ? 0 : verify::source_checksum(a, nullptr, t), t,
               own);
    if (g.lane() == 0) {
      hop.logical_rows += 1;
      hop.logical_bytes += wire_stride(a.plan.call);
    }
  }
}

}  // namespace detail

// Sends one channel's rows to every node. The enter signal of a rail peer (awaited in relay) means that its
// staging area is free again, so the rows may be sent at once.
template <Group G, Fabric<G> F>
MOE_HD void send(G g, F f, const DispatchArgs& a, int channel) {
  const int begin = channel_begin(a.plan.tokens, channel, a.b.shape.channels);
  const int end = channel_begin(a.plan.tokens, channel + 1, a.b.shape.channels);
  for (int step = 1; step < a.b.geometry.nodes(); ++step)
    detail::send_to_node(g, f, a, detail::outgoing_rows(f, a, step, channel), begin, end);
  detail::note_local_rows(g, f, a, begin, end);
  g.sync();
}

// The node's verdict is sent behind the rows, so that every rank gets it in this same call.
template <Group G, Fabric<G> F>
MOE_HD void judge(G g, F f, const DispatchArgs& a) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), nodes = b.geometry.nodes();
  if (g.lane() == 0 && nodes > 1) {
    Verdict* out = f.rail(b.rail.verdict_out);
    *out = *a.verdict;
    for (int step = 1; step < nodes; ++step) {
      const int n = (own + step) % nodes;
      put(f, n, b.rail.verdicts + own, out);
      f.signal_rail(n, b.rail.verdict + own, 1);
    }
  }
  g.sync();
}

}  // namespace moecomm
