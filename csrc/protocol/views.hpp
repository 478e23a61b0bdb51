// What the roles of one call see: views of memory that the runtime owns. Trivially copyable.
#pragma once
#include "base/layout.hpp"

namespace moecomm {

// Fixed for a Buffer.
struct BufferView {
  Geometry geometry;
  Shape shape;
  CountLayout count;
  NodeLayout node;
  RailLayout rail;
  bool check = false;  // MOECOMM_CHECK=1

  MOE_HD int experts_per_rank() const { return shape.num_experts / geometry.size; }
  MOE_HD int experts_per_node() const { return shape.num_experts / geometry.nodes(); }

  // Slot i of source node n, in tables of the gateway.
  MOE_HD int64_t row_index(int n, int i) const { return int64_t{n} * shape.max_tokens + i; }
  MOE_HD int channel_index(int n, int channel) const { return n * shape.channels + channel; }
  // Slot 0 of node `from` in the areas of node `at`, which have no slots for node `at` itself.
  MOE_HD uint64_t remote_row(int from, int at) const { return remote_index(from, at) * shape.max_tokens; }

  // Offsets in a rail region.
  MOE_HD CounterAt rows_counter(int n, int channel) const { return rail.rows + channel_index(n, channel); }
  MOE_HD CounterAt back_counter(int n, int channel) const { return rail.back + channel_index(n, channel); }
  MOE_HD Offset<RowMeta> meta(int n, int slot) const {
    return rail.metas.moved(row_index(n, slot) * meta_bytes(shape.top_k));
  }
  MOE_HD Offset<char> area_a(int from, int at) const {
    return rail.area_a + remote_row(from, at) * shape.slot_bytes();
  }
  MOE_HD Offset<char> area_b(int from, int at) const {
    return rail.area_b + remote_row(from, at) * shape.slot_bytes();
  }
};

inline BufferView make_view(const Geometry& g, const Shape& s, bool check) {
  return BufferView{g, s, count_layout(g, s), node_layout(g, s), rail_layout(g, s), check};
}

// The plan: where every row of one routing goes. Private to a rank; kept in the handle.
struct PlanView {
  // Source side: tokens of this rank.
  int32_t tokens = 0;
  uint8_t* picks = nullptr;       // [T] number of picks
  Pick* pick = nullptr;           // [T, K] ascending; `expert` is global here
  int32_t* slot = nullptr;        // [T, N] slot in the staging area of that node's gateway, -1: not sent
  int32_t* send_first = nullptr;  // [N, C+1] first slot of each channel
  int32_t* blocks = nullptr;      // [N, ints] count block per destination node
  // Gateway side: rows of my rail's sources for my node. Slot i of source node n is at n*max_tokens + i.
  int32_t* rows = nullptr;           // [N]
  int32_t* channel_first = nullptr;  // [N, C+1] first slot of each channel
  uint8_t* row_picks = nullptr;      // [N, max_tokens]
  Place* place = nullptr;            // [N, max_tokens, K]
  int32_t* row_token = nullptr;      // [N, max_tokens] the source's token (written only when checks are on)
  // Receiver side.
  int64_t* tokens_per_expert = nullptr;  // [E/R]
  int64_t* rows_per_expert = nullptr;    // [E/R] padded
  int64_t* rank_rows = nullptr;          // [P] rows of every rank of this node
  int32_t* announced = nullptr;  // [E/R, R] rows that come from every source (only when checks are on)
  CallShape call;

  // What divides by the geometry is given: loops ask for it once.
  MOE_HD int32_t slot_of(int token, int node, int nodes) const { return slot[int64_t{token} * nodes + node]; }
  MOE_HD int32_t first_slot(int node, int channel, int channels) const {
    return send_first[node * (channels + 1) + channel];
  }
  MOE_HD int32_t first_row(int node, int channel, int channels) const {
    return channel_first[node * (channels + 1) + channel];
  }
};

// Counter values that this rank has already consumed. Private, grows with every call.
struct Book {
  uint64_t enter = 0;   // with every announcement and every combine
  uint64_t blocks = 0;  // count blocks announced
  uint64_t counts = 0;  // count blocks relayed
  uint64_t dispatches = 0;
  uint64_t combines = 0;
  uint64_t* rows = nullptr;  // [N, C]
  uint64_t* back = nullptr;  // [N, C]
};

struct DispatchArgs {
  BufferView b;
  PlanView plan;
  Book* book = nullptr;
  bool cached = false;             // the plan is reused: no counts travel
  bool alone = false;              // an exchange of counts and nothing else
  Why refused = Why::none;         // this rank sends nothing and tells the others so
  const int64_t* ids64 = nullptr;  // [T, K], one of the two
  const int32_t* ids32 = nullptr;
  const char* x = nullptr;         // [T, row_bytes]
  const char* scales = nullptr;    // [T, scale_bytes] or null
  const float* weights = nullptr;  // [T, K] or null
  int32_t* asked =
      nullptr;  // [N, ints] blocks with the picks of logical experts (picks.hpp); null: the plan's own travel
  int32_t* base =
      nullptr;  // scratch [N, max(E/N, P)]: first row of each source node, per expert or rank of mine
  int32_t* first = nullptr;       // scratch [max(E/N, P)]
  Offer* offers = nullptr;        // private copy of the node's offers [P]
  BlockLayout* target = nullptr;  // [P] out: window offsets of every rank's block
  uint64_t* needed = nullptr;     // [P] out: its bytes
  Verdict* verdict = nullptr;     // out
};

struct CombineArgs {
  BufferView b;
  PlanView plan;
  Book* book = nullptr;
  RowsBoard mine;  // where my rows and weights lie in my window
  Why refused =
      Why::none;  // this rank has no rows and wants none, and tells the others so: the plan is not looked at
  RowsBoard* boards = nullptr;  // scratch [P]: everyone's
  Wire wire = Wire::plain;      // how the rows of other nodes come to this rank; others choose for themselves
  char* y = nullptr;            // [T, H]
  float* slots = nullptr;       // [T, K] or null: every pick's value of its row's `back`, 0 where there is no
                                // pick; null on all ranks or on none, else the call is a mismatch
  const float* bias = nullptr;  // [H] or [T, H] or null
  int64_t bias_stride = 0;      // floats from one token's bias to the next
};

// First token of channel c: channels are contiguous slices, so a channel's slots are contiguous too.
MOE_HD inline int32_t channel_begin(int32_t tokens, int channel, int channels) {
  return static_cast<int32_t>(int64_t{tokens} * channel / channels);
}

}  // namespace moecomm
