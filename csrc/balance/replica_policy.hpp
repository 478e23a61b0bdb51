// The choice of replicas for a batch of one layer: maps picks of logical experts to expert slots, and
// computes the rows of each slot. A pure function of its input, so a rank that knows every rank's picks per
// expert knows every rank's choice.
#pragma once
#include "balance/replicas.hpp"

namespace moecomm::balance {

enum class Mode : int32_t { local = 0, even = 1, optimal = 2 };

// One rank's picks.
struct Batch {
  const int64_t* ids = nullptr;  // [tokens, top_k] logical, -1: no pick
  int tokens = 0, top_k = 0;
  const int32_t* counts = nullptr;  // [experts]
};

class ReplicaPolicy {
 public:
  // activate: the number of slots of a rank that may run in a batch; 0: all.
  ReplicaPolicy(const int32_t* physical_to_logical, int slots, int experts, int ranks, int nodes, Mode mode,
                int activate);

  const Replicas& replicas() const { return r_; }
  // Whether the choice depends on the picks of all ranks.
  bool needs_all() const { return mode_ == Mode::optimal || activate_ > 0; }
  // Whether a rank's rows per slot follow from its picks per expert. If replicas are chosen token by token,
  // they do not: they depend on which picks belong to the same token.
  bool rows_follow() const { return mode_ != Mode::local; }

  // The part of the choice that is common to all ranks.
  struct Solved {
    int32_t rotation = 0;
    std::vector<uint8_t> active;  // [slots], empty: all
    // [slots] by replica: the run of its expert's tokens that it takes (Mode::optimal).
    std::vector<int32_t> from, to;
  };
  // total[experts]: the picks of all ranks; ignored unless needs_all(). rotation: changes with every batch,
  // so that remainders do not always go to the same replica; equal on all ranks if needs_all().
  Solved solve(const int32_t* total, int32_t rotation) const;

  // The rows of rank `source` for a slot, from its picks per expert and those of the ranks before it.
  // Requires rows_follow().
  int32_t rows(const Solved& s, int source, const int32_t* before, const int32_t* counts, int slot) const;
  // The slots of this rank's picks, physical[tokens, top_k]; -1 if no replica is active.
  void route(const Solved& s, const Batch& batch, int rank, const int32_t* before, int64_t* physical) const;

 private:
  Replicas r_;
  Mode mode_;
  int activate_;
};

}  // namespace moecomm::balance
