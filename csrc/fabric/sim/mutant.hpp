// A Fabric with one flaw: what a protocol with that bug would do. Exploration has to find each of them.
#pragma once
#include "fabric/sim/net.hpp"

namespace moecomm {

enum class Flaw : int32_t {
  none,
  signal_before_put,  // a signal overtakes the puts before it
  skip_wait,          // a wait is left out
  early_wait,         // a wait is content with one less: an epoch or a count too early
  late_wait,          // a wait wants one more
  less_signalled,     // a signal counts one row less
  more_signalled,     // a signal counts one row more
  drop_put,           // a put is left out
  skip_rank,          // rows for one rank of the node are not forwarded
  skip_signal,        // one rank of the node is not told
  one_half,           // every announcement uses the same half of the memory for count blocks
  other_half,         // a rank leaves a half out when it has chosen
  any_word,           // nobody looks at the number and verb of a call
  hidden_refusal,     // a gateway does not pass on that its rail peer refuses its part
  absent_refusal,     // a rank that refuses its part is not in the call at all
};

struct Mutation {
  Flaw flaw = Flaw::none;
  Phase phase = Phase::none;  // the waits that are meant
  bool chosen = false;        // only what follows a choice of replicas, until the call is over
};

struct MutantFabric : SimFabric {
  Mutation mutation;
  const bool* chosen;  // the rank has chosen replicas in this call
  const RailLayout* layout;
  const CountLayout* count;
  int halves;                         // of the memory for count blocks
  const uint64_t *blocks, *combines;  // announced so far, and made

  bool is(Flaw flaw) const { return mutation.flaw == flaw && (!mutation.chosen || *chosen); }
  bool hits(Flaw flaw, Phase phase) const { return mutation.phase == phase && is(flaw); }
  int victim() const { return net->rank(me).geometry.ranks_per_node - 1; }  // by local rank

  void put(int peer, uint64_t offset, const char* src, uint64_t bytes) const {
    if (is(Flaw::drop_put) && net->chaos().below(8) == 0) return;
    SimFabric::put(peer, offset, src, bytes);
  }
  void signal_rail(int peer, CounterAt counter, uint64_t add) const {
    if (is(Flaw::less_signalled) && add > 1) --add;
    if (is(Flaw::more_signalled) && add > 1) ++add;
    net->signal_rail(space, peer, counter.value, add, !is(Flaw::signal_before_put));
  }
  void signal_node(int local, CounterAt counter, uint64_t add) const {
    if (is(Flaw::skip_signal) && local == victim()) return;
    SimFabric::signal_node(local, counter, add);
  }
  Status wait_rail(CounterAt counter, uint64_t at_least, Phase phase, int peer) const {
    const Status s = hits(Flaw::skip_wait, phase)
                         ? Status{}
                         : SimFabric::wait_rail(counter, wanted(at_least, phase), phase, peer);
    if (s.ok() && (is(Flaw::any_word) || is(Flaw::hidden_refusal)))
      overlook(phase, peer / net->rank(me).geometry.ranks_per_node);
    return s;
  }
  // What node n's rail peer has said of its call, after it came.
  void overlook(Phase phase, int n) const {
    const RailLayout& l = *layout;
    const int nodes = net->rank(me).geometry.nodes();
    if (phase == Phase::announce) {
      const uint64_t at = count->ints * (*blocks % halves * nodes + n);
      int32_t *theirs = rail(l.blocks + at), *own = rail(l.blocks_out + at);
      if (is(Flaw::any_word))
        theirs[count->word] = own[count->word];
      else if (theirs[count->cached] < 0)
        theirs[count->cached] = 0;
    } else if (phase == Phase::reduce || phase == Phase::sum) {
      Wish* theirs = rail(l.wishes + ((*combines & 1) * nodes + n));
      if (is(Flaw::any_word))
        theirs->word = rail(l.wish_out)->word;
      else
        theirs->code = 0;
    }
  }
  Status wait_node(CounterAt counter, uint64_t at_least, Phase phase, int peer) const {
    return hits(Flaw::skip_wait, phase) ? Status{}
                                        : SimFabric::wait_node(counter, wanted(at_least, phase), phase, peer);
  }
  uint64_t wanted(uint64_t at_least, Phase phase) const {
    if (hits(Flaw::early_wait, phase) && at_least > 0) return at_least - 1;
    return hits(Flaw::late_wait, phase) ? at_least + 1 : at_least;
  }
  template <class G>
  void copy_row(G g, char* dst, const char* src, uint64_t bytes) const {
    if (is(Flaw::skip_rank) && net->owner_of(dst) % net->rank(me).geometry.ranks_per_node == victim() &&
        net->owner_of(dst) != me)
      return;
    SimFabric::copy_row(g, dst, src, bytes);
  }
};
static_assert(Fabric<MutantFabric, Lane>);

}  // namespace moecomm
