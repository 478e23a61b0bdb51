// Builds the arguments of dispatch and combine. One function per structure, for every world and for the
// tests.
#pragma once
#include "protocol/views.hpp"
#include "session/calls.hpp"
#include "session/rules.hpp"

namespace moecomm {

// Scratch memory of a dispatch, besides its plan and in the same kind of memory. DispatchArgs describes the
// fields.
struct DispatchScratch {
  int32_t* base;
  int32_t* first;
  Offer* offers;
  BlockLayout* target;
  uint64_t* needed;
  Verdict* verdict;
};

// Sets the fields of the plan that the call decides. A reused plan keeps its tokens and its layout, but the
// format of its rows may change.
constexpr void open_plan(PlanView& plan, const DispatchCall& call) {
  if (call.refused != Why::none) {
    plan.tokens = 0;
    plan.call = {};
  } else if (!call.cached) {
    plan.tokens = call.tokens;
    plan.call = call.shape;
  } else {
    plan.call.row_bytes = call.shape.row_bytes;
    plan.call.scale_bytes = call.shape.scale_bytes;
    plan.call.scales = call.shape.scales;
    plan.call.scales_by_column = call.shape.scales_by_column;
  }
}

// Call open_plan(plan, call) first. logical_blocks: the count blocks with the picks of logical experts, which
// are sent before the expert slots are chosen; null if the call's ids are expert slots already.
constexpr DispatchArgs make_dispatch_args(const BufferView& b, const PlanView& plan, Consumed* consumed,
                                          const DispatchScratch& scratch, const DispatchCall& call,
                                          int32_t* logical_blocks) {
  const bool alone = false;
  return {b,
          plan,
          consumed,
          call.cached,
          alone,
          call.refused,
          call.ids64,
          call.ids32,
          call.x,
          call.scales,
          call.weights,
          logical_blocks,
          scratch.base,
          scratch.first,
          scratch.offers,
          scratch.target,
          scratch.needed,
          scratch.verdict};
}

// For an exchange of `logical_blocks` alone, without a plan and without rows.
constexpr DispatchArgs make_exchange_args(const BufferView& b, Consumed* consumed, const CallShape& shape,
                                          Why refused, int32_t* logical_blocks) {
  PlanView plan;
  plan.call = shape;
  DispatchCall call;
  call.refused = refused;
  const DispatchScratch none{};
  return make_dispatch_args(b, plan, consumed, none, call, logical_blocks);
}

// Window offsets of this rank's rows and of the values that belong to them; 0: there are none. publish() adds
// the fields that identify the call.
template <SessionRules R = EveryRule>
constexpr RowsBoard make_board(Offset<char> rows, Offset<float> weights, Offset<float> back,
                               Offset<uint64_t> sums, R rules = {}) {
  if (!rules.keeps(Rule::fill_board)) weights = {};
  return {rows, weights, back, sums};
}

// boards: scratch for the boards of all ranks of the node.
constexpr CombineArgs make_combine_args(const BufferView& b, const PlanView& plan, Consumed* consumed,
                                        RowsBoard* boards, const RowsBoard& mine, const CombineCall& call) {
  return {b,         plan,   consumed,      mine,           call.refused, boards,
          call.wire, call.y, call.returned, call.sums_back, call.bias,    call.bias_stride};
}

// For a rank that refuses its part. Its plan is not read.
constexpr CombineArgs make_refused_combine_args(const BufferView& b, Consumed* consumed, RowsBoard* boards,
                                                Why why) {
  CombineCall call;
  call.refused = why;
  return make_combine_args(b, {}, consumed, boards, {}, call);
}

}  // namespace moecomm
