// MutantFabric: a Fabric with one fault, so that the protocol behaves as if it had that bug. Exploration must
// find each mutant.
#pragma once
#include "fabric/sim/net.hpp"

namespace moecomm {

enum class Mutant : int32_t {
  none,
  signal_before_put,  // a signal overtakes the puts before it
  skip_wait,          // a wait is left out
  early_wait,         // a wait ends at a value one too small: an epoch or a count too early
  late_wait,          // a wait expects one more
  less_signaled,      // a signal counts one row less
  more_signaled,      // a signal counts one row more
  drop_put,           // a put is left out
  skip_rank,          // rows for one rank of the node are not forwarded
  skip_signal,        // one rank of the node gets no signal
  one_half,           // every announcement uses the same half of the memory for count blocks
  other_half,         // rank 0 skips a half after it has chosen
  any_word,           // the number and verb of a call are not compared
  hidden_refusal,     // a gateway does not relay the refusal of its rail peer
  absent_refusal,     // a rank that refuses its part does not take part in the call at all
  // Of the session (session/rules.hpp): a rule that is not followed.
  no_rule_a,     // a decode dispatch does not wait for the previous one
  no_rule_b,     // a decode dispatch does not wait for the combine of two epochs ago
  no_rule_d,     // a further combine of an epoch does not wait for the combine before
  wrong_epoch,   // the rules use the wrong epoch
  wrong_mode,    // rank 0 inverts in decode's flags whether weights are sent
  short_piece,   // a dispatch reserves no room for the experts' output
  unset_board,   // combine's board lacks the offset of the weights
  await_masked,  // a decode dispatch waits for a masked rank
  send_masked,   // a decode dispatch sends picks to a masked rank
  old_epoch,     // after a mask, a rank continues from its own epoch
};

struct Mutation {
  Mutant mutant = Mutant::none;
  Phase phase = Phase::none;  // of the waits that are changed
  bool chosen = false;        // the fault acts only from a choice of replicas to the end of the call
};

struct MutantFabric : SimFabric {
  Mutation mutation;
  const bool* chosen;  // whether the rank has chosen replicas in this call
  const RailLayout* layout;
  const CountLayout* count;
  int halves;                         // of the memory for count blocks
  const uint64_t *blocks, *combines;  // number of announcements and of combines so far

  bool is(Mutant mutant) const { return mutation.mutant == mutant && (!mutation.chosen || *chosen); }
  bool hits(Mutant mutant, Phase phase) const { return mutation.phase == phase && is(mutant); }
  int victim() const { return net->rank(me).geometry.ranks_per_node - 1; }  // by local rank

  void put(int peer, uint64_t offset, const char* src, uint64_t bytes) const {
    if (is(Mutant::drop_put) && net->chaos().below(8) == 0) return;
    SimFabric::put(peer, offset, src, bytes);
  }
  void signal_rail(int peer, CounterAt counter, uint64_t add) const {
    if (is(Mutant::less_signaled) && add > 1) --add;
    if (is(Mutant::more_signaled) && add > 1) ++add;
    net->signal_rail(space, peer, counter.value, add, !is(Mutant::signal_before_put));
  }
  void signal_node(int local, CounterAt counter, uint64_t add) const {
    if (is(Mutant::skip_signal) && local == victim()) return;
    SimFabric::signal_node(local, counter, add);
  }
  Status wait_rail(CounterAt counter, uint64_t at_least, Phase phase, int peer) const {
    const Status s = hits(Mutant::skip_wait, phase)
                         ? Status{}
                         : SimFabric::wait_rail(counter, wanted(at_least, phase), phase, peer);
    if (s.ok() && (is(Mutant::any_word) || is(Mutant::hidden_refusal)))
      overlook(phase, peer / net->rank(me).geometry.ranks_per_node);
    return s;
  }
  // Overwrites what node n's rail peer has announced about its call, after it has arrived.
  void overlook(Phase phase, int n) const {
    const RailLayout& l = *layout;
    const int nodes = net->rank(me).geometry.nodes();
    if (phase == Phase::announce) {
      const uint64_t at = count->ints * (*blocks % halves * nodes + n);
      int32_t *theirs = rail(l.blocks + at), *own = rail(l.blocks_out + at);
      if (is(Mutant::any_word))
        theirs[count->word] = own[count->word];
      else if (theirs[count->cached] < 0)
        theirs[count->cached] = 0;
    } else if (phase == Phase::reduce || phase == Phase::sum) {
      CombineVerdict* theirs = rail(l.combine_verdicts + ((*combines & 1) * nodes + n));
      if (is(Mutant::any_word))
        theirs->word = rail(l.combine_verdict_out)->word;
      else
        theirs->decide(Code::ok, 0, Why::none);
    }
  }
  Status wait_node(CounterAt counter, uint64_t at_least, Phase phase, int peer) const {
    return hits(Mutant::skip_wait, phase)
               ? Status{}
               : SimFabric::wait_node(counter, wanted(at_least, phase), phase, peer);
  }
  uint64_t wanted(uint64_t at_least, Phase phase) const {
    if (hits(Mutant::early_wait, phase) && at_least > 0) return at_least - 1;
    return hits(Mutant::late_wait, phase) ? at_least + 1 : at_least;
  }
  template <Group G>
  void copy_row(G g, char* dst, const char* src, uint64_t bytes) const {
    if (is(Mutant::skip_rank) && net->owner_of(dst) % net->rank(me).geometry.ranks_per_node == victim() &&
        net->owner_of(dst) != me)
      return;
    SimFabric::copy_row(g, dst, src, bytes);
  }
};
static_assert(Fabric<MutantFabric, Lane>);

}  // namespace moecomm
