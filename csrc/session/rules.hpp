// The rules that a session follows, by name. Production code follows all of them at no cost. Exploration has
// mutants that leave one out, and it must find each of them (moecomm/sim/mutations.py).
#pragma once
#include <concepts>
#include <cstdint>

namespace moecomm {

enum class Rule : int32_t {
  receive_last,   // (A) of protocol/decode.hpp
  sum_before,     // (B) of protocol/decode.hpp
  await_release,  // (D) of protocol/decode.hpp
  count_by_ones,  // the epoch before e is e-1
  say_mode,       // decode's flags carry the mode of the call
  hold_output,    // a dispatch's part of the arena has room for the experts' output
  fill_board,     // the rows board has the offsets of everything that combine reads
  skip_masked,    // decode does not wait for the dispatch of a masked rank
  mask_picks,     // decode does not send picks to a masked rank
  move_epoch,     // after a mask, decode continues from the highest epoch of all remaining ranks
};

template <class R>
concept SessionRules = requires(const R rules, Rule rule) {
  { rules.keeps(rule) } -> std::same_as<bool>;
};

struct EveryRule {
  static constexpr bool keeps(Rule) { return true; }
};
static_assert(SessionRules<EveryRule>);

}  // namespace moecomm
