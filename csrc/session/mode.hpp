// The mode of a decode call. Flags carry it besides the epoch, so that ranks detect a peer that made the call
// with other arguments.
#pragma once
#include "base/decode_layout.hpp"
#include "session/rules.hpp"

namespace moecomm {

// code: the format of the rows, a ScaleKind in dispatch and a Wire in combine. weighted: weights are sent
// too.
template <class Code, SessionRules R = EveryRule>
constexpr int32_t decode_mode(Code code, bool weighted, R rules = {}) {
  const int32_t mode = static_cast<int32_t>(code) | (weighted ? 4 : 0);
  return rules.keeps(Rule::say_mode) ? mode : mode ^ 4;
}

}  // namespace moecomm
