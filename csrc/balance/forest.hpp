// Few replicas that still balance the ranks perfectly: the replicas with a share form a forest of experts and
// ranks.
#pragma once
#include "balance/replicas.hpp"

namespace moecomm::balance {

// Consider the bipartite graph of experts and ranks, in which every running replica is an edge that carries
// its share of the expert's load. Every change here preserves the load of each expert and of each rank: load
// is shifted around a cycle, so that the replicas on it alternately gain and lose, until one has no share
// left and can stop. A graph without cycles has at most experts + ranks - 1 replicas, and the number of slots
// that may run is usually that small. Which replicas run can still be chosen: a replica that starts closes a
// cycle, and another one of the cycle stops.
class Forest {
 public:
  // share[replicas] must balance the ranks. Initially all replicas with a share run.
  Forest(const Replicas& r, double* share);
  // Shifts load around cycles until there is no cycle. Of the two directions it takes the one that stops a
  // replica on the rank that runs more of them.
  void prune();
  // Starts replicas on ranks that run fewer than `limit`, so that ranks above the limit run one less. Gives
  // up after `attempts` changes.
  void fit(int limit, int attempts);
  bool runs(int replica) const { return runs_[replica] != 0; }

 private:
  void span(int root);
  void shift(int entering, int leaving, int root);

  const Replicas& r_;
  double* share_;
  std::vector<uint8_t> runs_;
  std::vector<int32_t> used_;
  std::vector<int32_t> up_;  // [experts + ranks] the replica towards the root; -1: the root, or another tree
  // [experts] on the path to the root: the replica with the smallest share that a shift would reduce.
  std::vector<int32_t> least_;
  std::vector<int32_t> queue_;
};

}  // namespace moecomm::balance
