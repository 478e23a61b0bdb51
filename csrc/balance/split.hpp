// The dynamic split: how many of an expert's tokens each of its replicas takes, so that the heaviest rank is
// as light as this batch allows. A pure function of its input: every rank computes the same.
#pragma once
#include "balance/replicas.hpp"

namespace moecomm::balance {

// Gauss-Seidel water-filling: one expert after the other pours its tokens where its ranks are lowest, given
// what all others do. Each pour lowers the sum of squared rank loads, whose minimum also has the lowest
// maximum. A round goes beyond that (over-relaxation), which still lowers the sum, and carries load along
// chains of ranks in fewer rounds.
//
// load[experts] tokens; active[replicas] or null for all; share[replicas] out, fractional. An expert without
// an active replica gets no share. Stops when four rounds lower the heaviest rank by less than 1e-4 of the
// mean. Returns the heaviest rank's load.
double split(const Replicas& r, const double* load, const uint8_t* active, int rounds, double* share);

// The state behind it, for callers that start and stop replicas on the way and go on from where they are.
class Pouring {
 public:
  Pouring(const Replicas& r, const double* load, const uint8_t* active);
  void start(int replica);  // pour() its expert afterwards
  void stop(int replica);
  void pour(int expert) {
    pour(expert, 1.0);
  }  // its tokens anew over its active replicas, all others as they are
  double settle(int rounds);  // rounds over all experts that have a choice; the heaviest rank's load
  const std::vector<double>& rank_load() const { return rank_load_; }
  double share(int replica) const { return share_[place_[replica]]; }

 private:
  void pour(int expert, double beyond);
  void trade(int expert, double beyond);
  const Replicas& r_;
  const double* load_;
  // By expert as in Replicas, but the active ones come first, so that a pour looks at nothing else.
  std::vector<int32_t> rank_, replica_, place_;
  std::vector<double> share_;
  std::vector<int32_t> running_;   // [experts] active replicas
  std::vector<int32_t> choosing_;  // experts with several
  std::vector<double> rank_load_, level_;
  double enough_ = 0.0;
};

// Whole tokens: those of an expert are numbered over all sources in rank order, and its replicas take
// consecutive runs [from, to) of them, the first of which belongs to replica (expert + turn) mod n.
// total[experts]; from, to [replicas] out.
void runs(const Replicas& r, const int32_t* total, const double* share, int turn, int32_t* from, int32_t* to);

// Every source for itself: what one (active) replica takes of `count` tokens of its expert where all take as
// many.
int32_t even_quota(const Replicas& r, int replica, int32_t count, const uint8_t* active, int turn);

}  // namespace moecomm::balance
