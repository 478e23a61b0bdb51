// How ranks enter a collective verb together: no byte moves before all ranks are in the same call.
//
//   agree   [all ranks]  Sends one word per rank to its node, then one word per node over every rail. All
//                        ranks get the same verdict: ok, or the rank that refuses, or a rank that makes
//                        another call.
//
// It is also a barrier: earlier writes of a rank are visible to the ranks of its node, and its tensors may be
// written. There are two places for words, chosen by the parity of the call, because a peer can be one call
// ahead.
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/verbs_views.hpp"

namespace moecomm {

namespace detail {

// The first refusal; else the first word that is not ok or whose signature differs from that of the first
// word.
MOE_HD inline CallWord fold_words(const CallWord* word, int count, int first_rank, int stride) {
  CallWord all = word[0];
  for (int i = 1; i < count; ++i) {
    const CallWord& w = word[i];
    if (all.code == Code::refused) break;
    if (w.code == Code::refused) {
      all = w;
    } else if (all.code == Code::ok && w.code != Code::ok) {
      all = w;
    } else if (all.code == Code::ok && w.signature != word[0].signature) {
      all.code = Code::mismatch;
      all.rank = first_rank + i * stride;
    }
  }
  return all;
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD Status agree(G g, F f, const DomainView& d, DomainConsumed* consumed, uint64_t signature,
                    Why refused) {
  const Geometry& geo = d.geometry;
  const int p = geo.ranks_per_node, nodes = geo.nodes();
  return leader(g, [&]() -> Status {
    const uint64_t call = ++consumed->calls;
    const int parity = static_cast<int>(call & 1);
    CallWord mine;
    mine.signature = signature;
    mine.rank = geo.rank;
    mine.why = refused;
    mine.code = refused == Why::none ? Code::ok : Code::refused;
    for (int i = 0; i < p; ++i) {
      *f.window(i, d.at.words + (parity * p + geo.local())) = mine;
      f.signal_node(i, d.at.entered + geo.local(), 1);
    }
    for (int i = 0; i < p; ++i)
      MOE_TRY(f.wait_node(d.at.entered + i, call, Phase::announce, geo.rank_at(geo.node(), i)));
    CallWord all =
        detail::fold_words(f.window(geo.local(), d.at.words + parity * p), p, geo.rank_at(geo.node(), 0), 1);
    if (nodes > 1) {
      CallWord* out = f.rail(d.at.word_out + parity);
      *out = all;
      CallWord* verdicts = f.rail(d.at.verdicts + parity * nodes);
      verdicts[geo.node()] = all;
      for (int n = 0; n < nodes; ++n) {
        if (n == geo.node()) continue;
        put(f, geo.rail_rank(n), d.at.verdicts + (parity * nodes + geo.node()), out);
        f.signal_rail(geo.rail_rank(n), d.at.agreed + geo.node(), 1);
      }
      for (int n = 0; n < nodes; ++n)
        if (n != geo.node()) MOE_TRY(f.wait_rail(d.at.agreed + n, call, Phase::announce, geo.rail_rank(n)));
      all = detail::fold_words(verdicts, nodes, 0, p);
    }
    Status s;
    s.code = all.code;
    if (!s.ok()) {
      s.phase = Phase::announce;
      s.peer = all.rank;
      s.detail = number(all.why);
    }
    return s;
  });
}

}  // namespace moecomm
