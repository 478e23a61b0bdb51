// Views of memory that the runtime owns, for the roles of one call. Trivially copyable.
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

  // Index of slot i of source node n in the gateway's tables.
  MOE_HD int64_t row_index(int n, int i) const { return int64_t{n} * shape.max_tokens + i; }
  MOE_HD int channel_index(int n, int channel) const { return n * shape.channels + channel; }
  // Index of slot 0 of node `from` in the areas of node `at`, which have no slots for node `at` itself.
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

// The plan: where every row of one routing goes. Private to a rank; the handle keeps it.
struct PlanView {
  // Source side: tokens of this rank.
  int32_t tokens = 0;
  uint8_t* picks = nullptr;       // [T] number of picks
  Pick* pick = nullptr;           // [T, K] ascending; `expert` is global here
  int32_t* slot = nullptr;        // [T, N] stage slot at that node's gateway, -1: not sent
  int32_t* send_first = nullptr;  // [N, C+1] first slot of each channel
  int32_t* blocks = nullptr;      // [N, ints] count block per destination node
  // Gateway side: rows of this rail's sources for this node. Slot i of source node n is at n*max_tokens + i.
  int32_t* rows = nullptr;           // [N]
  int32_t* channel_first = nullptr;  // [N, C+1] first slot of each channel
  uint8_t* row_picks = nullptr;      // [N, max_tokens]
  Place* place = nullptr;            // [N, max_tokens, K]
  int32_t* row_token = nullptr;      // [N, max_tokens] the source's token (written only when checks are on)
  // Receiver side.
  int64_t* tokens_per_expert = nullptr;  // [E/R]
  int64_t* rows_per_expert = nullptr;    // [E/R] padded
  int64_t* rank_rows = nullptr;          // [P] rows of every rank of this node
  int32_t* announced = nullptr;          // [E/R, R] announced rows of every source (only when checks are on)
  CallShape call;

  // The caller passes `nodes` or `channels`, so that a loop computes it only once.
  MOE_HD int32_t slot_of(int token, int node, int nodes) const { return slot[int64_t{token} * nodes + node]; }
  MOE_HD int32_t first_slot(int node, int channel, int channels) const {
    return send_first[node * (channels + 1) + channel];
  }
  MOE_HD int32_t first_row(int node, int channel, int channels) const {
    return channel_first[node * (channels + 1) + channel];
  }
};

// Counter values that this rank has already consumed. Private to the rank; the values only grow.
struct Consumed {
  uint64_t enter = 0;   // announcements and combines
  uint64_t blocks = 0;  // count blocks announced
  uint64_t counts = 0;  // count blocks relayed
  uint64_t dispatches = 0;
  uint64_t combines = 0;
  uint64_t* rows = nullptr;  // [N, C]
  uint64_t* back = nullptr;  // [N, C]
};

// The arguments of the roles. They have no defaults, so that no field can be forgotten. Only session/
// constructs them.
struct DispatchArgs {
  BufferView b;
  PlanView plan;
  Consumed* consumed;
  bool cached;           // the plan is reused, and the places of its rows with it
  bool alone;            // an exchange of counts without a dispatch
  Why refused;           // set: this rank sends nothing and announces that it refuses
  const int64_t* ids64;  // [T, K]; the picks are in ids64 or ids32, the other one is null
  const int32_t* ids32;
  const char* x;         // [T, row_bytes]
  const char* scales;    // [T, scale_bytes] or null
  const float* weights;  // [T, K] or null
  // [N, ints] count blocks with the picks of logical experts (picks.hpp); null: the plan's blocks are sent.
  int32_t* logical_blocks;
  int32_t* base;   // scratch [N, max(E/N, P)]: first row of each source node, per expert or rank of this node
  int32_t* first;  // scratch [max(E/N, P)]
  Offer* offers;   // private copy of the node's offers [P]
  BlockLayout* target;  // [P] out: window offsets of every rank's block
  uint64_t* needed;     // [P] out: bytes of every rank's block and its experts' output
  Verdict* verdict;     // out

  MOE_HD constexpr DispatchArgs(const BufferView& b, const PlanView& plan, Consumed* consumed, bool cached,
                                bool alone, Why refused, const int64_t* ids64, const int32_t* ids32,
                                const char* x, const char* scales, const float* weights,
                                int32_t* logical_blocks, int32_t* base, int32_t* first, Offer* offers,
                                BlockLayout* target, uint64_t* needed, Verdict* verdict)
      : b(b),
        plan(plan),
        consumed(consumed),
        cached(cached),
        alone(alone),
        refused(refused),
        ids64(ids64),
        ids32(ids32),
        x(x),
        scales(scales),
        weights(weights),
        logical_blocks(logical_blocks),
        base(base),
        first(first),
        offers(offers),
        target(target),
        needed(needed),
        verdict(verdict) {}
};

struct CombineArgs {
  BufferView b;
  PlanView plan;
  Consumed* consumed;
  RowsBoard mine;     // where this rank's rows and weights are in its window
  Why refused;        // set: this rank neither sends nor gets rows and announces that; the plan is not read
  RowsBoard* boards;  // scratch [P]: the boards of the node's ranks
  Wire wire;          // format in which other nodes send rows to this rank; each rank chooses its own
  char* y;            // [T, H]
  float* returned;  // [T, K] or null: for every pick the `back` value of its row, 0 if there is no pick. Null
                    // on all ranks or on none, else the call is a mismatch
  bool sums_back;   // `returned` gets the sums of `back` over each token's rows instead (in the expert layout
                    // only the first entry); equal on all ranks
  const float* bias;    // [H] or [T, H] or null
  int64_t bias_stride;  // floats from one token's bias to the next

  MOE_HD constexpr CombineArgs(const BufferView& b, const PlanView& plan, Consumed* consumed,
                               const RowsBoard& mine, Why refused, RowsBoard* boards, Wire wire, char* y,
                               float* returned, bool sums_back, const float* bias, int64_t bias_stride)
      : b(b),
        plan(plan),
        consumed(consumed),
        mine(mine),
        refused(refused),
        boards(boards),
        wire(wire),
        y(y),
        returned(returned),
        sums_back(sums_back),
        bias(bias),
        bias_stride(bias_stride) {}

  MOE_HD Returns returns() const {
    return returned == nullptr ? Returns::nothing : sums_back ? Returns::sums : Returns::values;
  }
};

// First token of channel c: channels are contiguous slices, so a channel's slots are contiguous too.
MOE_HD inline int32_t channel_begin(int32_t tokens, int channel, int channels) {
  return static_cast<int32_t>(int64_t{tokens} * channel / channels);
}

}  // namespace moecomm
