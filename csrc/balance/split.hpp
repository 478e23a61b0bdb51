// The dynamic split: computes how many of an expert's tokens each of its replicas takes, so that the heaviest
// rank is as light as this batch allows. A pure function of its input, so every rank computes the same.
#pragma once
#include "balance/replicas.hpp"

namespace moecomm::balance {

// Gauss-Seidel water-filling: one expert after the other distributes its tokens over its ranks, lowest load
// first, while the tokens of all other experts stay in place. Each step reduces the sum of squared rank
// loads, whose minimum also has the least maximum. Steps within a round overshoot their optimum
// (over-relaxation). This still reduces the sum, and moves load along chains of ranks in fewer rounds.
//
// load[experts]: tokens; active[replicas], or null for all; share[replicas] out, fractional. An expert
// without an active replica gets no share. Stops when four rounds reduce the heaviest rank by less than 1e-4
// of the mean. Returns the load of the heaviest rank.
double split(const Replicas& r, const double* load, const uint8_t* active, int rounds, double* share);

// The state of the split, for callers that start and stop replicas and continue from the current shares.
class Pouring {
 public:
  Pouring(const Replicas& r, const double* load, const uint8_t* active);
  void start(int replica);  // pour() its expert afterwards
  void stop(int replica);
  // Distributes the tokens of an expert over its active replicas; the other experts do not change.
  void pour(int expert) { pour(expert, 1.0); }
  // Makes rounds over all experts with several active replicas. Returns the load of the heaviest rank.
  double relax(int rounds);
  const std::vector<double>& rank_load() const { return rank_load_; }
  double share(int replica) const { return share_[place_[replica]]; }

 private:
  void pour(int expert, double beyond);
  void trade(int expert, double beyond);
  const Replicas& r_;
  const double* load_;
  // By expert as in Replicas, but with the active replicas first, so that a pour reads only those.
  std::vector<int32_t> rank_, replica_, place_;
  std::vector<double> share_;
  std::vector<int32_t> running_;   // [experts] active replicas
  std::vector<int32_t> choosing_;  // experts with several active replicas
  std::vector<double> rank_load_, level_;
  double enough_ = 0.0;
};

// Rounds shares to whole tokens. The tokens of an expert are numbered over all sources in rank order, and its
// replicas take consecutive runs [from, to) of them. The first run belongs to replica (expert + rotation) mod
// n. total[experts]; from, to [replicas] out.
void runs(const Replicas& r, const int32_t* total, const double* share, int rotation, int32_t* from,
          int32_t* to);

// How many of a source's `count` tokens of an expert one of its active replicas takes if all take equally
// many.
int32_t even_quota(const Replicas& r, int replica, int32_t count, const uint8_t* active, int rotation);

}  // namespace moecomm::balance
