// Quantization of rows to FP8 in dispatch. `send` reads the caller's rows once and needs no intermediate
// tensor.
//
// A token's row is quantized into the staging area of the first other node that it is sent to. Rows for
// further nodes, and for this rank's node, are copied from there. If the token is sent to no other node,
// `forward` quantizes it into a row that belongs to the channel, and copies it from there to the ranks of the
// node.
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/views.hpp"

namespace moecomm {

// A row's size on the rail in this call. Slots are contiguous, so that adjacent rows are sent in one put.
MOE_HD inline uint64_t wire_stride(const CallShape& c) {
  return align16(c.row_bytes) + align16(c.scale_bytes);
}

MOE_HD inline bool quantizes(const DispatchArgs& a) {
  return a.plan.call.scales != ScaleKind::none && a.scales == nullptr;
}

namespace detail {

// The token's FP8 row in the staging area for one of the first `steps` - 1 nodes after this rank's, or null.
template <LaneFabric F>
MOE_HD const char* staged_row(F f, const DispatchArgs& a, int t, int steps) {
  const BufferView& b = a.b;
  const int own = b.geometry.node(), nodes = b.geometry.nodes();
  for (int step = 1; step < steps; ++step) {
    const int n = (own + step) % nodes, slot = a.plan.slot_of(t, n, nodes);
    if (slot < 0) continue;
    return f.rail(b.area_b(n, own)) + slot * wire_stride(a.plan.call);
  }
  return nullptr;
}

template <Group G, Fabric<G> F>
MOE_HD void quantize_token(G g, F f, const DispatchArgs& a, int t, char* row) {
  const Shape& s = a.b.shape;
  f.quantize_row(g, row, row + align16(a.plan.call.row_bytes), a.x + t * s.combine_row_bytes(), s.hidden,
                 s.dtype, a.plan.call.scales);
  if (g.lane() == 0) ++f.counters().quantized_rows;
}

// Fills the token's slot for the node `step` after this rank's node.
template <Group G, Fabric<G> F>
MOE_HD void stage_quantized(G g, F f, const DispatchArgs& a, int t, int step, char* row) {
  if (const char* earlier = staged_row(f, a, t, step))
    f.copy_row(g, row, earlier, wire_stride(a.plan.call));
  else
    quantize_token(g, f, a, t, row);
  if (a.b.check) g.sync();  // the caller computes its checksum next
}

// The token's FP8 row for this rank's node. It is valid after a sync, until the next call for this channel.
template <Group G, Fabric<G> F>
MOE_HD const char* own_quantized(G g, F f, const DispatchArgs& a, int t, int channel) {
  if (const char* staged = staged_row(f, a, t, a.b.geometry.nodes())) return staged;
  char* row = f.rail(a.b.rail.own_rows) + channel * align_up(a.b.shape.wire_bytes(Wire::fp8), 64);
  g.sync();  // all lanes have copied the previous row
  quantize_token(g, f, a, t, row);
  return row;
}

// Writes the scales of one row into a block of `rows` rows, either contiguously or each into its column.
// step: words from one scale in `from` to the next.
template <Group G, Fabric<G> F>
MOE_HD void put_scales(G g, F f, const CallShape& call, char* scales, int64_t rows, int64_t row,
                       const char* from, int64_t step = 1) {
  if (call.scale_bytes == 0) return;
  if (!call.scales_by_column) return f.copy_row(g, scales + row * call.scale_bytes, from, call.scale_bytes);
  const uint32_t* source = Offset<uint32_t>{}.in(from);
  uint32_t* column = Offset<uint32_t>{}.in(scales) + row;
  for (int64_t i = g.lane(); i < static_cast<int64_t>(call.scale_bytes / 4); i += g.size())
    column[i * scale_column(rows)] = source[i * step];
}

// The same from another row of the block.
template <Group G, Fabric<G> F>
MOE_HD void copy_scales(G g, F f, const CallShape& call, char* scales, int64_t rows, int64_t row,
                        int64_t from) {
  const uint64_t bytes = call.scales_by_column ? 4 : call.scale_bytes;
  put_scales(g, f, call, scales, rows, row, scales + from * bytes, scale_column(rows));
}

template <Group G, Fabric<G> F>
MOE_HD void zero_scales(G g, F f, const CallShape& call, char* scales, int64_t rows, int64_t row) {
  if (call.scale_bytes == 0) return;
  if (!call.scales_by_column) return f.zero_row(g, scales + row * call.scale_bytes, call.scale_bytes);
  uint32_t* column = Offset<uint32_t>{}.in(scales) + row;
  for (int64_t i = g.lane(); i < static_cast<int64_t>(call.scale_bytes / 4); i += g.size())
    column[i * scale_column(rows)] = 0;
}

}  // namespace detail

}  // namespace moecomm
