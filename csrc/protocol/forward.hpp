// The node hop of dispatch.
//
//   forward           (gateway)  copies each row to its final places in its owners' windows   [per channel]
//   announce_arrival  (gateway)  announces "I have forwarded everything", with the verdict of all nodes
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/quantize.hpp"
#include "protocol/verify.hpp"

namespace moecomm {

namespace detail {

// Rank layout: sets all picks of a row to -1. The picks are written after a sync.
template <Group G>
MOE_HD void clear_picks(G g, char* window, const BlockLayout& l, int64_t row, int k_max) {
  for (int k = g.lane(); k < k_max; k += g.size()) {
    l.ids.in(window)[row * k_max + k] = -1;
    l.weights.in(window)[row * k_max + k] = 0.0f;
  }
}

// The rows of one channel from the rail peer on node `node`: slots [begin, end). Values that need a division
// by the geometry are computed once, here.
struct Incoming {
  int node, channel, source;
  int begin, end;
  int per_rank, per_node;  // experts
  bool remote;             // the rows came over the rail; else they are in this rank's `x`
  bool coding;             // this rank quantizes them to FP8
  uint64_t stride, meta_size;
  const RowMeta* metas;
  const char* area;
};

template <LaneFabric F>
MOE_HD Incoming incoming_rows(F f, const DispatchArgs& a, int node, int channel) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), channels = b.shape.channels;
  Incoming in;
  in.node = node;
  in.channel = channel;
  in.source = b.geometry.rail_rank(node);
  in.begin = a.plan.first_row(node, channel, channels);
  in.end = a.plan.first_row(node, channel + 1, channels);
  in.per_rank = b.experts_per_rank();
  in.per_node = b.experts_per_node();
  in.remote = node != own;
  in.coding = !in.remote && quantizes(a);
  in.stride = wire_stride(a.plan.call);
  in.meta_size = meta_bytes(b.shape.top_k);
  in.metas = f.rail(b.meta(node, 0));
  in.area = in.remote ? f.rail(b.area_a(node, own)) : nullptr;
  return in;
}

// Waits until the rows up to `end` have arrived.
template <Group G, Fabric<G> F>
MOE_HD Status wait_chunk(G g, F f, const DispatchArgs& a, const Incoming& in, int end) {
  if (!in.remote) return {};
  return leader(g, [&] {
    const uint64_t seen = a.consumed->rows[a.b.channel_index(in.node, in.channel)];
    return f.wait_rail(a.b.rows_counter(in.node, in.channel), seen + (end - in.begin), Phase::forward,
                       in.source);
  });
}

// A row's payload and its scales (null: none), before it is forwarded.
struct SourceRow {
  const char* payload;
  const char* scales;
};

template <Group G, Fabric<G> F>
MOE_HD SourceRow source_row(G g, F f, const DispatchArgs& a, const Incoming& in, int i, int token) {
  const CallShape& call = a.plan.call;
  const char* row = in.coding   ? own_quantized(g, f, a, token, in.channel)
                    : in.remote ? in.area + i * in.stride
                                : a.x + token * call.row_bytes;
  const char* scales = in.remote || in.coding ? row + align16(call.row_bytes)
                       : a.scales             ? a.scales + token * call.scale_bytes
                                              : nullptr;
  return {row, scales};
}

// Computes the final place of every pick of row i and keeps it for combine. A reused plan has the places
// already. Ends with a sync.
template <Group G>
MOE_HD const Place* locate_picks(G g, const DispatchArgs& a, const Incoming& in, int i, const RowMeta* meta) {
  const BufferView& b = a.b;
  const bool by_rank = a.plan.call.layout == RowLayout::rank;
  const int p = b.geometry.ranks_per_node;
  const int64_t row = b.row_index(in.node, i);
  Place* place = a.plan.place + row * b.shape.top_k;
  if (g.lane() == 0) {
    a.plan.row_picks[row] = static_cast<uint8_t>(meta->picks);
    if (b.check) a.plan.row_token[row] = meta->token;
  }
  if (!a.cached)
    for (int j = g.lane(); j < meta->picks; j += g.size()) {
      const Pick pick = meta->pick()[j];
      const int d = pick.expert / in.per_rank;
      const int32_t first = by_rank ? a.base[in.node * p + d] : a.base[in.node * in.per_node + pick.expert];
      place[j] = {static_cast<int16_t>(d), pick.k, pick.ordinal + first};
    }
  g.sync();
  return place;
}

// Counts of the rows that a gateway has forwarded.
struct Forwarded {
  uint64_t rows = 0, left = 0;  // to any rank of the node; to ranks other than itself
};

// Lists the addresses that the payload is copied to in f.targets(), and writes its scales beside them.
// Returns their number. Ends with a sync.
template <Group G, Fabric<G> F>
MOE_HD int list_targets(G g, F f, const DispatchArgs& a, const Place* place, int picks, const char* scales,
                        Forwarded& done) {
  const CallShape& call = a.plan.call;
  const bool by_rank = call.layout == RowLayout::rank;
  char** targets = f.targets();
  int copies = 0;
  for (int j = 0; j < picks; ++j) {
    const Place to = place[j];
    const BlockLayout& block = a.target[to.local];
    char* window = f.window(to.local);
    if (j == 0 || place[j - 1].local != to.local) {
      ++done.rows;
      done.left += to.local != a.b.geometry.local();
      if (by_rank) clear_picks(g, window, block, to.row, a.b.shape.top_k);
    } else if (by_rank || !f.replicates(to.local)) {
      continue;  // arrive copies it there
    }
    if (copies % g.size() == g.lane()) targets[copies] = block.rows.in(window) + to.row * call.row_bytes;
    const int64_t rows = call.capacity >= 0 ? call.capacity : a.plan.rank_rows[to.local];
    put_scales(g, f, call, block.scales.in(window), rows, to.row, scales);
    ++copies;
  }
  g.sync();
  return copies;
}

// Writes the values beside the payload of every pick: weights, ids, the origin of the payload, and its
// source.
template <Group G, Fabric<G> F>
MOE_HD void write_row_meta(G g, F f, const DispatchArgs& a, const Incoming& in, const RowMeta* meta,
                           const Place* place, uint64_t checksum) {
  const bool by_rank = a.plan.call.layout == RowLayout::rank;
  const int k_max = a.b.shape.top_k;
  for (int j = g.lane(); j < meta->picks; j += g.size()) {
    const Pick pick = meta->pick()[j];
    const int d = place[j].local, r = place[j].row;
    int first = j;
    while (first > 0 && place[first - 1].local == d) --first;
    const BlockLayout& target = a.target[d];
    char* window = f.window(d);
    float* weights = target.weights.in(window);
    if (by_rank) {
      target.ids.in(window)[int64_t{r} * k_max + pick.k] = pick.expert - d * in.per_rank;
      weights[int64_t{r} * k_max + pick.k] = pick.weight;
      if (first != j) continue;  // one lane writes what the picks share
    } else {
      weights[r] = pick.weight;
      target.origin.in(window)[r] = f.replicates(d) ? -1 - place[first].row : place[first].row;
    }
    target.source.in(window)[r] = int64_t{in.source} << 32 | meta->token;
    if (a.b.check) target.sums.in(window)[r] = checksum;
  }
}

template <Group G, Fabric<G> F>
MOE_HD void forward_row(G g, F f, const DispatchArgs& a, const Incoming& in, int i, Forwarded& done) {
  const RowMeta* meta = moved(in.metas, i * in.meta_size);
  const SourceRow row = source_row(g, f, a, in, i, meta->token);
  const Place* place = locate_picks(g, a, in, i, meta);
  const int copies = list_targets(g, f, a, place, meta->picks, row.scales, done);
  const uint64_t checksum = in.coding ? verify::source_checksum(a, row.payload, meta->token) : meta->checksum;
  f.spread_row(g, f.targets(), copies, row.payload, a.plan.call.row_bytes);
  write_row_meta(g, f, a, in, meta, place, checksum);
  g.sync();  // then the targets may be overwritten
}

}  // namespace detail

// Forwards one channel of the rows of the rail peer on node `node`. Every row is read once. It is written
// once per owner, or once per pick if a further copy crosses no link.
template <Group G, Fabric<G> F>
MOE_HD Status forward(G g, F f, const DispatchArgs& a, int node, int channel) {
  const BufferView& b = a.b;
  const detail::Incoming in = detail::incoming_rows(f, a, node, channel);
  const bool refused = !a.verdict->ok();
  detail::Forwarded done;
  for (int chunk = in.begin; chunk < in.end; chunk += b.shape.chunk_rows) {
    const int chunk_end = chunk + b.shape.chunk_rows < in.end ? chunk + b.shape.chunk_rows : in.end;
    MOE_TRY(detail::wait_chunk(g, f, a, in, chunk_end));
    if (refused) continue;  // the rows are consumed and dropped, since they have no final place
    if (b.check && in.remote)
      MOE_TRY(verify::rail_rows(g, a, in.metas, in.area, in.stride, chunk, chunk_end, in.source));
    for (int i = chunk; i < chunk_end; ++i) detail::forward_row(g, f, a, in, i, done);
  }
  if (g.lane() == 0) {
    if (in.remote) a.consumed->rows[b.channel_index(node, channel)] += in.end - in.begin;
    const uint64_t bytes = a.plan.call.row_bytes + a.plan.call.scale_bytes;
    HopCounters& hop = f.counters().node;
    hop.logical_rows += done.rows;
    hop.physical_rows += done.left;
    hop.logical_bytes += done.rows * bytes;
    hop.physical_bytes += done.left * bytes;
  }
  g.sync();
  return {};
}

// After a gateway's last channel: announces the verdict of all nodes and that all rows are forwarded.
template <Group G, Fabric<G> F>
MOE_HD Status announce_arrival(G g, F f, const DispatchArgs& a) {
  const BufferView& b = a.b;
  const Geometry& geo = b.geometry;
  return leader(g, [&] {
    Verdict all = *a.verdict;
    for (int n = 0; n < geo.nodes(); ++n) {
      if (n == geo.node()) continue;
      MOE_TRY(f.wait_rail(b.rail.verdict + n, a.consumed->dispatches, Phase::forward, geo.rail_rank(n)));
      const Verdict& theirs = f.rail(b.rail.verdicts)[n];
      if (all.ok()) all = theirs;
    }
    for (int d = 0; d < geo.ranks_per_node; ++d) {
      f.window(d, b.node.verdicts)[geo.local()] = all;
      f.signal_node(d, b.node.arrive + geo.local(), 1);
    }
    return Status{};
  });
}

}  // namespace moecomm
