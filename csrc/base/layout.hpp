// The layout of a Buffer's memory. One function per memory gives every offset AND the total size, so the two
// cannot disagree.
//
//   node window   mapped by all ranks of the node: counters, count tables, boards, the arena
//   rail region   written by the rail peers only: counters, count blocks, verdicts, two staging areas
//   block         the output of one dispatch, inside the arena
#pragma once
#include "base/wire.hpp"

namespace moecomm {

// The first cache line of a node window and of a rail region. A waiting rank writes here which counter it
// sleeps on.
struct MemoryHeader {
  uint64_t sleeping_on;  // offset of a counter; 0: the rank does not sleep
  uint64_t pad[7];
};

namespace detail {
struct Cursor {
  uint64_t at = 0;
  MOE_HD constexpr uint64_t take(uint64_t bytes, uint64_t alignment = 64) {
    at = align_up(at, alignment);
    const uint64_t here = at;
    at += bytes;
    return here;
  }
  template <class T>
  MOE_HD constexpr Offset<T> take(uint64_t count, uint64_t alignment = 64) {
    return {take(sizeof(T) * count, alignment)};
  }
};
}  // namespace detail

struct NodeLayout {
  CounterAt counts;          // per local rank: its count tables have arrived (dispatch)
  CounterAt arrive;          // per local rank: it has forwarded all its rows for this rank (dispatch)
  CounterAt ready;           // per local rank: its rows may be read (combine)
  CounterAt done;            // per local rank: it has read this rank's rows (combine)
  Offset<FaultWord> faults;  // per local rank
  Offset<Offer> offers;      // per local rank
  Offset<Verdict> verdicts;  // per local rank, as its gateway knows it (dispatch)
  Offset<RowsBoard> board;   // of this rank
  Offset<int32_t> tables;    // per half and source rank: its count block for this node
  Offset<char> arena;
  uint64_t bytes;
};

MOE_HD constexpr NodeLayout node_layout(const Geometry& g, const Shape& s) {
  NodeLayout l{};
  detail::Cursor c;
  const uint64_t p = g.ranks_per_node;
  c.take(sizeof(MemoryHeader));
  l.counts = c.take<uint64_t>(p);
  l.arrive = c.take<uint64_t>(p);
  l.ready = c.take<uint64_t>(p);
  l.done = c.take<uint64_t>(p);
  l.faults = c.take<FaultWord>(p);
  l.offers = c.take<Offer>(p);
  l.verdicts = c.take<Verdict>(p);
  l.board = c.take<RowsBoard>(1);
  l.tables = c.take<int32_t>(uint64_t(count_layout(g, s).ints) * g.size * s.count_halves());
  l.arena = c.take<char>(s.arena_bytes, 4096);
  l.bytes = align_up(c.at, 4096);
  return l;
}

// Staging area A holds rows that arrive in dispatch and rows that leave in combine. Area B holds rows that
// leave in dispatch and rows that arrive in combine. The two uses never overlap in time: a peer writes to an
// area only after the area's owner has entered the call.
struct RailLayout {
  CounterAt enter;    // per node: the rail peer is in the call, and its count block has arrived
  CounterAt rows;     // per node and channel: rows that arrived in area A
  CounterAt verdict;  // per node: its verdict has arrived
  CounterAt back;     // per node and channel: rows that arrived in area B
  Offset<CombineVerdict> combine_verdicts;     // per parity of the combine and node (combine)
  Offset<CombineVerdict> combine_verdict_out;  // what this rank sends to its rail peers
  Offset<FaultWord> faults;                    // per node
  Offset<int32_t> blocks;                      // per half and node: a count block
  // *_out: the sources of outgoing puts, which must not change until the puts are complete.
  Offset<int32_t> blocks_out;  // this rank's count blocks, if puts must have their sources in the rail region
  Offset<Verdict> verdicts;    // per node
  Offset<Verdict> verdict_out;
  Offset<FaultWord> fault_out;
  Offset<RowMeta> metas;      // per node (this rank's node included) and slot; meta_bytes() apart
  Offset<RowMeta> metas_out;  // per remote node and slot
  Offset<uint64_t> sums;      // per remote node and slot of area B: checksum
  Offset<uint64_t> sums_out;
  Offset<float> returned;  // [top_k] per remote node and slot of area B: values returned to the picks
  Offset<float> returned_out;
  Offset<char> own_rows;  // per channel: an FP8 row for ranks of this node
  Offset<char> area_a;    // per remote node: stage slots
  Offset<char> area_b;
  uint64_t bytes;
};

MOE_HD constexpr RailLayout rail_layout(const Geometry& g, const Shape& s) {
  RailLayout l{};
  detail::Cursor c;
  const uint64_t n = g.nodes(), remote = n - 1, t = s.max_tokens;
  c.take(sizeof(MemoryHeader));
  l.enter = c.take<uint64_t>(n);
  l.rows = c.take<uint64_t>(n * s.channels);
  l.verdict = c.take<uint64_t>(n);
  l.back = c.take<uint64_t>(n * s.channels);
  l.combine_verdicts = c.take<CombineVerdict>(2 * n);
  l.combine_verdict_out = c.take<CombineVerdict>(1);
  l.faults = c.take<FaultWord>(n);
  l.blocks = c.take<int32_t>(count_layout(g, s).ints * n * s.count_halves());
  l.blocks_out = c.take<int32_t>(count_layout(g, s).ints * n * s.count_halves());
  l.verdicts = c.take<Verdict>(n);
  l.verdict_out = c.take<Verdict>(1);
  l.fault_out = c.take<FaultWord>(1, alignof(FaultWord));
  l.metas = {c.take(n * t * meta_bytes(s.top_k))};
  l.metas_out = {c.take(remote * t * meta_bytes(s.top_k))};
  l.sums = c.take<uint64_t>(remote * t);
  l.sums_out = c.take<uint64_t>(remote * t);
  l.returned = c.take<float>(remote * t * s.top_k);
  l.returned_out = c.take<float>(remote * t * s.top_k);
  l.own_rows = c.take<char>(s.channels * align_up(s.wire_bytes(Wire::fp8), 64));
  l.area_a = c.take<char>(remote * t * s.slot_bytes());
  l.area_b = c.take<char>(remote * t * s.slot_bytes());
  l.bytes = align_up(c.at, 4096);
  return l;
}

// The index of node `from` in the per-remote-node areas of a rank of node `at`.
MOE_HD constexpr uint64_t remote_index(int from, int at) { return from < at ? from : from - 1; }

// The distance between columns of scales, in words: columns are 16-byte aligned.
MOE_HD constexpr int64_t scale_column(int64_t rows) { return (rows + 3) / 4 * 4; }

// The output of one dispatch. Offsets are relative to the block.
struct BlockLayout {
  Offset<char> rows;
  Offset<char> scales;     // [rows, scales], or by column: [scales, scale_column(rows)]
  Offset<float> weights;   // [rows] in the expert layout, [rows, top_k] in the rank layout
  Offset<int64_t> ids;     // [rows, top_k], rank layout only
  Offset<int32_t> origin;  // [rows]: the row of this block from which `arrive` copies the payload; -1 - row:
                           // the payload is a copy of that row and has been written already
  Offset<int64_t> source;  // [rows]: source rank << 32 | source token, -1 on padding
  Offset<uint64_t> sums;   // checksum [rows] (written only when checks are on)
  uint64_t bytes;
};

MOE_HD constexpr BlockLayout block_layout(uint64_t rows, const CallShape& call, int top_k) {
  BlockLayout l{};
  detail::Cursor c;
  const bool by_rank = call.layout == RowLayout::rank;
  l.rows = c.take<char>(rows * call.row_bytes);
  l.scales = c.take<char>((call.scales_by_column ? scale_column(rows) : rows) * call.scale_bytes);
  l.weights = c.take<float>(rows * (by_rank ? top_k : 1));
  l.ids = c.take<int64_t>(by_rank ? rows * top_k : 0);
  l.origin = c.take<int32_t>(by_rank ? 0 : rows);
  l.source = c.take<int64_t>(rows);
  l.sums = c.take<uint64_t>(rows);
  l.bytes = align_up(c.at, 64);
  return l;
}

// The same offsets relative to a window, with the block at `offset`.
MOE_HD constexpr BlockLayout at_offset(BlockLayout l, uint64_t offset) {
  return {l.rows.moved(offset),   l.scales.moved(offset), l.weights.moved(offset), l.ids.moved(offset),
          l.origin.moved(offset), l.source.moved(offset), l.sums.moved(offset),    l.bytes};
}

// The experts' output of that dispatch, right behind its block: `handle.rows`, and staging memory for the
// values that combine sends with the rows.
struct OutputLayout {
  Offset<char> rows;
  Offset<float> weights;  // [rows]
  Offset<float> back;     // [rows, top_k]
  Offset<uint64_t> sums;  // checksum [rows] (written only when checks are on)
  uint64_t bytes;
};

MOE_HD constexpr OutputLayout output_layout(uint64_t rows, const Shape& s) {
  OutputLayout l{};
  detail::Cursor c;
  l.rows = c.take<char>(rows * s.combine_row_bytes());
  l.weights = c.take<float>(rows);
  l.back = c.take<float>(rows * s.top_k);
  l.sums = c.take<uint64_t>(rows);
  l.bytes = align_up(c.at, 64);
  return l;
}

}  // namespace moecomm
