// The stages of an epoch of decode, and rules (A), (B) and (C) of decode.hpp as predicates on them. A host
// uses them to follow the rules (session/turns.hpp), a GPU to check them (schedule/decode_slices.hpp).
#pragma once
#include "base/types.hpp"

namespace moecomm {

// done: it may be combined again. over: it may not, because a rank has refused its dispatch or combine.
enum class DecodeStage : int32_t { idle = 0, sent = 1, received = 2, answered = 3, done = 4, over = 5 };

MOE_HD constexpr bool can_combine(DecodeStage stage) {
  return stage == DecodeStage::received || stage == DecodeStage::done;
}

// Whether the rule allows to send dispatch e. `last` is the stage of epoch e-1, `before` the stage of e-2.
MOE_HD constexpr bool keeps_rule_a(DecodeStage last) { return last != DecodeStage::sent; }
MOE_HD constexpr bool keeps_rule_b(DecodeStage before) { return before != DecodeStage::answered; }
MOE_HD constexpr bool keeps_rule_c(DecodeStage last, bool same_bank) {
  return !same_bank || last != DecodeStage::answered;
}

// The failure of a call whose epoch is not in the stage that the call needs.
MOE_HD constexpr Status wrong_stage(DecodeStage needed, DecodeStage is) {
  return bad_pick(BadInput::wrong_stage, number(needed), number(is));
}

}  // namespace moecomm
