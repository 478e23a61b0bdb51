// One function per memory gives every offset AND the total size, so the two cannot disagree.
//
//   node window   mapped by all ranks of the node: counters, count tables, boards, the arena
//   rail region   written by the rail peers only: counters, count blocks, verdicts, two staging areas
//   block         the output of one dispatch, inside the arena
#pragma once
#include "base/wire.hpp"

namespace moecomm {

// Both memories start with this line; a waiter says there which counter it sleeps on.
struct MemoryHeader {
  uint64_t sleeping_on;  // offset of a counter, 0: nobody sleeps
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
};
}  // namespace detail

struct NodeLayout {
  uint64_t counts;    // counter per local rank: its count tables are here (dispatch)
  uint64_t arrive;    // counter per local rank: it forwarded everything it had for me (dispatch)
  uint64_t ready;     // counter per local rank: its rows may be read (combine)
  uint64_t done;      // counter per local rank: it has read my rows (combine)
  uint64_t faults;    // FaultWord per local rank
  uint64_t offers;    // Offer per local rank
  uint64_t verdicts;  // Verdict per local rank, as its gateway knows it (dispatch)
  uint64_t board;     // RowsBoard of this rank
  uint64_t tables;    // per half and source rank: its count block for this node
  uint64_t arena;
  uint64_t bytes;
};

MOE_HD constexpr NodeLayout node_layout(const Geometry& g, const Shape& s) {
  NodeLayout l{};
  detail::Cursor c;
  const uint64_t p = g.ranks_per_node;
  c.take(sizeof(MemoryHeader));
  l.counts = c.take(8 * p);
  l.arrive = c.take(8 * p);
  l.ready = c.take(8 * p);
  l.done = c.take(8 * p);
  l.faults = c.take(sizeof(FaultWord) * p);
  l.offers = c.take(sizeof(Offer) * p);
  l.verdicts = c.take(sizeof(Verdict) * p);
  l.board = c.take(sizeof(RowsBoard));
  l.tables = c.take(uint64_t{4} * count_layout(g, s).ints * g.size * s.count_halves());
  l.arena = c.take(s.arena_bytes, 4096);
  l.bytes = align_up(c.at, 4096);
  return l;
}

// Staging area A holds rows arriving in dispatch and rows leaving in combine; area B the other two.
// The two never overlap in time: a peer writes an area only after its owner entered the call.
struct RailLayout {
  uint64_t enter;       // counter per node: the rail peer is in the call, its count block is here
  uint64_t rows;        // counter per node and channel: rows landed in area A
  uint64_t verdict;     // counter per node: its verdict is here
  uint64_t back;        // counter per node and channel: rows landed in area B
  uint64_t wishes;      // per parity of the combines and node: its Wish (combine)
  uint64_t wish_out;    // what this rank sends to its peers
  uint64_t faults;      // FaultWord per node
  uint64_t blocks;      // per half and node: a count block
  uint64_t blocks_out;  // the own ones, leaving, where puts leave from here only
  uint64_t verdicts;    // Verdict per node
  uint64_t outbox;      // Verdict and FaultWord on their way out (sources of puts must stay put)
  uint64_t metas;       // RowMeta per node and slot, also the own node's
  uint64_t metas_out;   // RowMeta per remote node and slot, leaving
  uint64_t sums;        // checksum per remote node and slot of area B
  uint64_t sums_out;
  uint64_t slots;  // f32 [top_k] per remote node and slot of area B: what goes back to the picks' slots
  uint64_t slots_out;
  uint64_t own_rows;  // per channel: an FP8 row on its way to ranks of the own node
  uint64_t area_a;    // row slots per remote node
  uint64_t area_b;
  uint64_t bytes;
};

MOE_HD constexpr RailLayout rail_layout(const Geometry& g, const Shape& s) {
  RailLayout l{};
  detail::Cursor c;
  const uint64_t n = g.nodes(), remote = n - 1, t = s.max_tokens;
  c.take(sizeof(MemoryHeader));
  l.enter = c.take(8 * n);
  l.rows = c.take(8 * n * s.channels);
  l.verdict = c.take(8 * n);
  l.back = c.take(8 * n * s.channels);
  l.wishes = c.take(sizeof(Wish) * 2 * n);
  l.wish_out = c.take(sizeof(Wish));
  l.faults = c.take(sizeof(FaultWord) * n);
  l.blocks = c.take(uint64_t{4} * count_layout(g, s).ints * n * s.count_halves());
  l.blocks_out = c.take(uint64_t{4} * count_layout(g, s).ints * n * s.count_halves());
  l.verdicts = c.take(sizeof(Verdict) * n);
  l.outbox = c.take(sizeof(Verdict) + sizeof(FaultWord));
  l.metas = c.take(n * t * meta_bytes(s.top_k));
  l.metas_out = c.take(remote * t * meta_bytes(s.top_k));
  l.sums = c.take(remote * t * 8);
  l.sums_out = c.take(remote * t * 8);
  l.slots = c.take(remote * t * s.top_k * 4);
  l.slots_out = c.take(remote * t * s.top_k * 4);
  l.own_rows = c.take(s.channels * align_up(s.wire_bytes(Wire::fp8), 64));
  l.area_a = c.take(remote * t * s.slot_bytes());
  l.area_b = c.take(remote * t * s.slot_bytes());
  l.bytes = align_up(c.at, 4096);
  return l;
}

// Rows of another node lie at this index in its peer's per-remote-node areas.
MOE_HD constexpr uint64_t remote_index(int from, int at) { return from < at ? from : from - 1; }

// Words from one column of scales to the next: columns start on 16 bytes.
MOE_HD constexpr int64_t scale_column(int64_t rows) { return (rows + 3) / 4 * 4; }

// The output of one dispatch. Offsets are relative to the block.
struct BlockLayout {
  uint64_t rows;
  uint64_t scales;   // [rows, scales], or by column: [scales, scale_column(rows)]
  uint64_t weights;  // f32: [rows] in the expert layout, [rows, top_k] in the rank layout
  uint64_t ids;      // int64 [rows, top_k], rank layout only
  uint64_t origin;   // int32 [rows]: the row that holds the payload until `arrive` copies it; -1 - that row:
                     // it is here already
  uint64_t source;   // int64 [rows]: source rank << 32 | source token, -1 on padding
  uint64_t sums;     // checksum [rows] (written only when checks are on)
  uint64_t bytes;
};

MOE_HD constexpr BlockLayout block_layout(uint64_t rows, const CallShape& call, int top_k) {
  BlockLayout l{};
  detail::Cursor c;
  const bool by_rank = call.layout == RowLayout::rank;
  l.rows = c.take(rows * call.row_bytes);
  l.scales = c.take((call.scales_by_column ? scale_column(rows) : rows) * call.scale_bytes);
  l.weights = c.take(rows * 4 * (by_rank ? top_k : 1));
  l.ids = c.take(by_rank ? rows * 8 * top_k : 0);
  l.origin = c.take(by_rank ? 0 : rows * 4);
  l.source = c.take(rows * 8);
  l.sums = c.take(rows * 8);
  l.bytes = align_up(c.at, 64);
  return l;
}

// The same, relative to the window in which the block lies at `offset`.
MOE_HD constexpr BlockLayout at_offset(BlockLayout l, uint64_t offset) {
  return {l.rows + offset,   l.scales + offset, l.weights + offset, l.ids + offset,
          l.origin + offset, l.source + offset, l.sums + offset,    l.bytes};
}

// The experts' output of that dispatch, right behind its block: `handle.rows`, and staging for what combine
// takes beside it.
struct OutputLayout {
  uint64_t rows;
  uint64_t weights;  // f32 [rows]
  uint64_t back;     // f32 [rows, top_k]
  uint64_t sums;     // checksum [rows] (written only when checks are on)
  uint64_t bytes;
};

MOE_HD constexpr OutputLayout output_layout(uint64_t rows, const Shape& s) {
  OutputLayout l{};
  detail::Cursor c;
  l.rows = c.take(rows * s.combine_row_bytes());
  l.weights = c.take(rows * 4);
  l.back = c.take(rows * 4 * s.top_k);
  l.sums = c.take(rows * 8);
  l.bytes = align_up(c.at, 64);
  return l;
}

}  // namespace moecomm
