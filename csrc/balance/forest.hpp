// Few replicas that still balance perfectly: shares whose replicas form a forest between experts and ranks.
#pragma once
#include "balance/replicas.hpp"

namespace moecomm::balance {

// Shares [replicas] that sum to every expert's load, and the ranks' loads that they make. Every change here
// keeps both: load is shifted around a cycle of experts and ranks, each replica on the way giving to or
// taking from the next, until one has nothing left and can stop. Without cycles no more than experts + ranks
// - 1 replicas are left - the number of slots that may run is usually that small, and which ones they are can
// still be chosen: a replica that starts closes a cycle, and another one of it stops.
class Forest {
 public:
  // share[replicas] balances the ranks; all replicas with a share run to begin with.
  Forest(const Replicas& r, double* share);
  // Shifts load around cycles until none is left. Of the two ways round, the one that relieves the fuller
  // rank.
  void prune();
  // Starts replicas on ranks that run fewer than `limit`, so that ranks above it run one less. Gives up after
  // `exchanges` attempts.
  void fit(int limit, int exchanges);
  bool runs(int replica) const { return runs_[replica] != 0; }

 private:
  void span(int root);
  void shift(int entering, int leaving, int root);

  const Replicas& r_;
  double* share_;
  std::vector<uint8_t> runs_;
  std::vector<int32_t> used_;
  std::vector<int32_t>
      up_;  // [experts + ranks] the replica that leads towards the root; -1: root, or another tree
  std::vector<int32_t>
      least_;  // [experts] on the way to the root: the smallest share that a shift would take from
  std::vector<int32_t> queue_;
};

}  // namespace moecomm::balance
