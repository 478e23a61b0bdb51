// The rules that a rank's session follows in the sim world: all except the one that its mutant leaves out.
#pragma once
#include "fabric/sim/mutant.hpp"
#include "session/rules.hpp"

namespace moecomm {

struct MutantRules {
  Mutant mutant;
  int rank;
  bool keeps(Rule rule) const {
    switch (rule) {
      case Rule::receive_last: return mutant != Mutant::no_rule_a;
      case Rule::sum_before: return mutant != Mutant::no_rule_b;
      case Rule::await_release: return mutant != Mutant::no_rule_d;
      case Rule::count_by_ones: return mutant != Mutant::wrong_epoch;
      case Rule::say_mode: return mutant != Mutant::wrong_mode || rank != 0;
      case Rule::hold_output: return mutant != Mutant::short_piece;
      case Rule::fill_board: return mutant != Mutant::unset_board;
      case Rule::skip_masked: return mutant != Mutant::await_masked;
      case Rule::mask_picks: return mutant != Mutant::send_masked;
      case Rule::move_epoch: return mutant != Mutant::old_epoch;
    }
    return true;
  }
};
static_assert(SessionRules<MutantRules>);

inline EveryRule rules_of(const SimFabric&) { return {}; }
inline MutantRules rules_of(const MutantFabric& f) { return {f.mutation.mutant, f.me}; }

}  // namespace moecomm
